"""The parts that several methods are made of."""
