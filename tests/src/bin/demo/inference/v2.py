"""Connections that ask a server of the Open Inference Protocol (V2) for an inference."""

import http.client
import json

import numpy
import tritonclient.grpc

PATIENCE = 10
FLOWER = [[6.3, 3.3, 6.0, 2.5]]
SPECIES = 2


class Http:
    """One connection of HTTP/1.1, kept alive."""

    def __init__(self, address):
        self.connection = http.client.HTTPConnection(address, 8080, timeout=PATIENCE)
        self.connection.connect()
        # One that was closed is a failure: none takes its place in silence.
        self.connection.auto_open = False

    def ask(self):
        """The version of the model that answered."""
        flowers = {"name": "flowers", "shape": [1, 4], "datatype": "FP64", "data": FLOWER}
        body = json.dumps({"inputs": [flowers]})
        headers = {"Content-Type": "application/json"}
        self.connection.request("POST", "/v2/models/iris/infer", body, headers)
        response = self.connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {text[:200]}")
        answer = json.loads(text)
        check(answer["outputs"][0]["data"][0])
        return answer["model_version"]

    def close(self):
        self.connection.close()


class Grpc:
    """One channel of gRPC, with a connection of its own."""

    OPTIONS = [
        # Otherwise all channels of a process share a connection to one address, ...
        ("grpc.use_local_subchannel_pool", 1),
        # ... and what failed is sent again before anybody hears of it.
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
    ]

    def __init__(self, address):
        self.client = tritonclient.grpc.InferenceServerClient(
            f"{address}:8081", channel_args=self.OPTIONS
        )
        self.flowers = tritonclient.grpc.InferInput("flowers", [1, 4], "FP64")
        self.flowers.set_data_from_numpy(numpy.array(FLOWER))

    def ask(self):
        """The version of the model that answered."""
        answer = self.client.infer("iris", [self.flowers], client_timeout=PATIENCE)
        check(answer.as_numpy("predict").flat[0])
        return answer.get_response().model_version

    def close(self):
        self.client.close()


def check(species):
    if species != SPECIES:
        raise RuntimeError(f"the flower is of species {SPECIES}, not {species}")
