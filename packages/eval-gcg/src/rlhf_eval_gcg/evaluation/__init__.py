"""An evaluation by attacks: who attacks what, how answers are sampled and judged, and the files that stay."""
