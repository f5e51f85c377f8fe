"""Quantising a model: text through it block by block, each linear solved, packed and written as it is done."""
