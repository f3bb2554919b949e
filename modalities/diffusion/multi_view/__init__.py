"""Views of one object: data, how far they agree, and the training of models that make them."""
