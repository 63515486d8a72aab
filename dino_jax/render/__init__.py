"""Multi-crop on the accelerator: `renderer` maps the image operations of `ops` over crops and images."""
