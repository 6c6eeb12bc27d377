//! Where Pinfold's threads live: hierarchies, layout, joining, limits, sums and clean-up.
