"""Images in prompts: what they are called, how large they are, how many tokens they take. No pixel is decoded here."""
