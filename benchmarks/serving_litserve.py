"""The server of LitServe in serving.py: a script of its own, because LitServe starts its workers anew and they import it.

PYTHON benchmarks/serving_litserve.py GRAPH PORT        # a Python with litserve, onnxruntime and numpy
"""

import sys
from typing import Any

import litserve as ls
import numpy as np
import onnxruntime as ort


class Forest(ls.LitAPI):
    "The ONNX graph, one row a request, one thread."

    def __init__(self, graph: str) -> None:
        super().__init__()
        self.graph = graph

    def setup(self, device: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(self.graph, options)

    def decode_request(self, request: dict) -> Any:
        return np.array([list(request.values())], np.float32)

    def predict(self, x: Any) -> Any:
        return self.session.run(None, {"X": x})

    def encode_response(self, output: Any) -> dict:
        return {"prediction": output[0][0], "confidence": float(output[1][0].max())}


if __name__ == "__main__":
    server = ls.LitServer(Forest(sys.argv[1]), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
