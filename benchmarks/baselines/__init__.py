"""Ways to hold a family in less memory, polymoe's and others', and one way to measure what its variants then say."""
