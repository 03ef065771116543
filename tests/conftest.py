"""What every test shares: the peers' torchvision beside a CPU build of torch."""
import run.lib.peers  # noqa: F401
