"""VoCo attention in a vision-language model: ``enable``, both passes, prompts, keys and fingerprints."""
