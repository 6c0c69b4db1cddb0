"""Prefix tuning of pretrained language models in JAX.

One idea holds the package together: a prefix is a KV cache that you can train.

Arrays carry their shape as a suffix of their name, and einsums use the same letters:

    B batch · T query tokens · S keys · P prefix length · L layers · N query heads
    K key/value heads · G query heads per key/value head, N/K · H head dim · D model dim
    F feed-forward dim · V vocabulary · M targets in a row
"""
