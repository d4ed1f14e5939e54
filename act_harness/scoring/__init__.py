"""Log-likelihoods of lm-eval's requests, every context computed once."""
