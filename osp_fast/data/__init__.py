"""From annotation files to training clips: which clips, in which order, and which frames of them."""
