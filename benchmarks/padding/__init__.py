"""Batches padded on the left and on the right through the artifacts of Calque and of its peers, against eager row by row."""
