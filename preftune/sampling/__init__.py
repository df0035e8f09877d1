"""From prompts to responses: several for each prompt, by models on this machine or behind a server, with their origin."""
