"""A training step under the VoCo mask, in four ways, and of a Q-Former."""
