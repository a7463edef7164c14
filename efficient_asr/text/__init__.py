"""Texts: normalisers, the alphabet of character models, codes of languages."""
