"""What storing the weights of a model as integers costs it."""
