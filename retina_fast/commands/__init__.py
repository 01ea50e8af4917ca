"""The commands of `retina-fast`: their options and what they print. What they do is functions of other packages."""
