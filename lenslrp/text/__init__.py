"""Text and tokens: what a row of tokens spells, its words, names, chat prompts."""
