"""Episodes: which there are, who plays them and where, what is recorded of them."""
