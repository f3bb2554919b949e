ABSENT = "needs a diffusion UNet: tests/modalities/diffusion"
