"""Trains two versions of a model that tells irises apart, and lays them out for MLServer.

    models.py DIRECTORY

DIRECTORY/1 is a small tree, DIRECTORY/2 a regression. Both come out the same each time.
"""

import json
import pathlib
import sys

import joblib
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

MODELS = {
    "1": DecisionTreeClassifier(max_depth=2, random_state=0),
    "2": make_pipeline(StandardScaler(), LogisticRegression(random_state=0)),
}

flowers, species = load_iris(return_X_y=True)
for version, model in MODELS.items():
    directory = pathlib.Path(sys.argv[1], version)
    directory.mkdir(parents=True)
    model.fit(flowers, species)
    joblib.dump(model, directory / "model.joblib")
    settings = {
        "name": "iris",
        "implementation": "mlserver_sklearn.SKLearnModel",
        "versions": [version],
        "inputs": [{"name": "flowers", "datatype": "FP64", "shape": [-1, 4]}],
        "outputs": [{"name": "predict", "datatype": "INT64", "shape": [-1, 1]}],
        "parameters": {"uri": "./model.joblib", "version": version},
    }
    (directory / "model-settings.json").write_text(json.dumps(settings))
    print(f"iris@{version}: right about {model.score(flowers, species):.1%} of {len(species)} flowers")
