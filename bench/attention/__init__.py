"""masked_attention against every rival that a user could reach for instead."""
