"""The paper's Table 2 and its ablation in small, trained through the product itself."""
