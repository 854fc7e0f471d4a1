"""Statistics of the softmax over a vocabulary, in little memory."""
