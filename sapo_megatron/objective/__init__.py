"""What is optimised, and how much of it: pure torch, tensors and process groups as arguments."""
