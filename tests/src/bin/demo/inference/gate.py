"""A gate: each backend of the standby answers over gRPC, and with the new version."""

import os
import sys

from v2 import Grpc

version = os.environ["BGSWITCH_VERSION"].removeprefix("iris@")
for backend in os.environ["BGSWITCH_BACKENDS"].split():
    address = backend.rsplit(":", 1)[0]
    answered = Grpc(address).ask()
    print(f"{address}: version {answered}")
    if answered != version:
        sys.exit(f"{address} should be version {version}")
