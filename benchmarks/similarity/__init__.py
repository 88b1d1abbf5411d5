"""Why sentences are alike: pairs of words, checked by intervention."""
