"""What claims on small pictures share: Fashion-MNIST where it is there, scikit-learn's digits where not."""

from ..measure.images import Images, read_images


def small_pictures(count: int, num_test: int) -> tuple[Images, Images]:
    """At most ``count`` pictures to learn from, and at most ``num_test`` others; their names say which set it is."""
    try:
        return read_images("fashion_mnist", "train", limit=count), read_images("fashion_mnist", "test", limit=num_test)
    except FileNotFoundError:
        learn, held_out = read_images("digits", "train"), read_images("digits", "test")
        return learn.take(min(count, len(learn))), held_out.take(min(num_test, len(held_out)))
