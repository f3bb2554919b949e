"""Image to video: I2V-Adapter, its training and what its clips start from."""
