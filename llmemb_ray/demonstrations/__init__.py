"""In-context demonstrations (paper 1, section 3.2): sentences with the one word that each means."""
