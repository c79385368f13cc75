"""Training of rewritten models: parameter groups and annealing for any loop, and a loop on Hugging Face accelerate."""
