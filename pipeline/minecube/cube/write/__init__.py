"""Write into a store: sites, site-years, labels, predictions, and packed files."""
