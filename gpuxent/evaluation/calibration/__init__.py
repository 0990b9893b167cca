"""How far to trust a model's probabilities, and how to mend them."""
