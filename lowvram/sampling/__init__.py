"""From networks to pictures: sampling, interpolation, grids and animations."""
