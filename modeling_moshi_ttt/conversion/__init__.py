"""Between Kyutai's layout, transformers' Moshi and this package's."""
