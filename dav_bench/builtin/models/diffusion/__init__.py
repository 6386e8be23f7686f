"""Latent text-to-image diffusion: pipelines of diffusers as models that methods search and train."""
