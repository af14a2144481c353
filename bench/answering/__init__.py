"""Questions about images through whole models: compressed before, or not."""
