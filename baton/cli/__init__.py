"""The `baton` command line."""

import os

# Ray forks helpers while gRPC runs. They exec at once, so gRPC need not prepare for it, nor report each fork.
# gRPC reads this when it is imported, hence here.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
