"""Reconstruct-and-Generate diffusion model for image denoising (arXiv 2309.10714)."""
