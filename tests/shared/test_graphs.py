"""shared.graphs: the published files where they lie, the same layouts written here, and what is wrong with bad ones."""

from __future__ import annotations

import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from shared import graphs
from shared.errors import UserError
from shared.graphs import EXPECTED, NAMES, Graph, available, check_masks, distinct_edges, load_graph

HOMOPHILY = {"cora": 0.810, "citeseer": 0.7351, "texas": 0.061, "wisconsin": 0.178, "film": 0.217}
HOMOPHILY |= {"chameleon": 0.230, "squirrel": 0.222, "cornell_fixed": 0.123}


def put(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def put_splits(folder: Path, name: str, nodes: int, **masks: np.ndarray) -> None:
    """Two splits: node i is in part i mod 3."""
    (folder / "splits").mkdir(parents=True, exist_ok=True)
    for k in range(2):
        parts = {f"{part}_mask": (np.arange(nodes) + k) % 3 == i for i, part in enumerate(("train", "val", "test"))}
        np.savez(folder / "splits" / f"{name}_split_0.6_0.2_{k}.npz", **(parts | masks))


def put_texas(folder: Path) -> None:
    rows = ["2\t0,0,1\t0", "0\t1,1,0\t0", "1\t0,0,0\t1", "3\t0,1,0\t1"]
    put(folder, "geom_gcn/texas/out1_node_feature_label.txt", "node_id\tfeature\tlabel\n" + "\n".join(rows) + "\n")
    put(folder, "geom_gcn/texas/out1_graph_edges.txt", "node_id\tnode_id\n0\t1\n1\t0\n0\t2\n3\t3\n0\t2\n")
    put_splits(folder, "texas", 4)


def put_cora(folder: Path, **parts: object) -> None:
    """Six nodes: 0..2 in allx, 3 and 5 in tx in the order (5, 3), 4 missing as in Citeseer."""
    (folder / "planetoid").mkdir(parents=True, exist_ok=True)
    eye = np.eye(2, dtype=np.int32)
    graph = defaultdict(list, {0: [1, 1, 5], 1: [0], 2: [2], 3: [], 4: [], 5: [0]})
    content: dict[str, object] = {
        "x": csr_matrix(np.eye(3, 4, dtype=np.float32)[:2]),
        "y": eye[[0, 1]],
        "allx": csr_matrix(np.eye(3, 4, dtype=np.float32)),
        "ally": eye[[0, 1, 0]],
        "tx": csr_matrix(np.array([[0, 0, 0, 5], [3, 0, 0, 0]], dtype=np.float32)),
        "ty": eye[[1, 0]],
        "graph": graph,
    } | parts
    for part, value in content.items():
        with open(folder / "planetoid" / f"ind.cora.{part}", "wb") as file:
            pickle.dump(value, file, protocol=2)
    put(folder, "planetoid/ind.cora.test.index", "5\n3\n")
    put_splits(folder, "cora", 6)


@pytest.mark.parametrize("name", NAMES)
def test_published_files(data_root: Path, name: str) -> None:
    folder = data_root / "planetoid-geomgcn"
    if name not in available(folder):
        pytest.skip(f"{name} is not in {folder}")
    graph = load_graph(folder, name)
    assert graph.counts() == EXPECTED[name]
    assert graph.homophily() == pytest.approx(HOMOPHILY.get(name, graph.homophily()), abs=6e-4)
    assert graph.adjacency().sum() == graph.edges.shape[1]
    assert graph.masks["train"].shape == (10, graph.nodes)
    assert len(graph.hashes()) == len(graph.files)
    if name == "citeseer":
        assert (graph.labels < 0).sum() == 15
        assert [len(graph.public_split[part]) for part in ("train", "val", "test")] == [120, 500, 1000]
    if name == "cornell":  # the published file is Texas's
        texas = load_graph(folder, "texas")
        assert np.array_equal(graph.labels, texas.labels)
        assert (graph.features != texas.features).nnz == 0


def test_geom_gcn_text(tmp_path: Path) -> None:
    put_texas(tmp_path)
    graph = load_graph(tmp_path, "texas", splits=2)
    assert graph.edges.tolist() == [[0, 0, 1, 3], [1, 2, 0, 3]]  # repeated lines count once, direction stays
    assert graph.directed
    assert graph.features.toarray().tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert graph.labels.tolist() == [0, 1, 0, 1]
    counts = {"nodes": 4, "features": 3, "classes": 2, "edges": 2, "loops": 1, "train": 2, "val": 1, "test": 1}
    assert graph.counts() == counts
    assert graph.homophily() == 0.5
    assert graph.masks["train"].tolist() == [[True, False, False, True], [False, False, True, False]]
    assert available(tmp_path) == ["texas"]
    assert not load_graph(tmp_path, "texas", splits=0).masks


def test_official_folder_names(tmp_path: Path) -> None:
    put_texas(tmp_path)
    (tmp_path / "geom_gcn").rename(tmp_path / "new_data")
    assert load_graph(tmp_path, "texas", splits=1).nodes == 4


def test_film_lists_the_ones(tmp_path: Path) -> None:
    table = "node_id\tfeature(feature_amount:931)\tlabel\n0\t931,3\t0\n1\t7\t1\n2\t0\t0\n"
    put(tmp_path, "geom_gcn/film/out1_node_feature_label.txt", table)
    put(tmp_path, "geom_gcn/film/out1_graph_edges.txt", "node_id\tnode_id\n0\t1\n")
    put_splits(tmp_path, "film", 3)
    graph = load_graph(tmp_path, "film", splits=2)
    assert graph.features.shape == (3, 932)
    assert sorted(graph.features[0].indices.tolist()) == [3, 931]
    put(tmp_path, "geom_gcn/film/out1_node_feature_label.txt", table.replace("931,3", "932"))
    with pytest.raises(UserError, match=r"line 2: feature 932, expected 0 to 931"):
        load_graph(tmp_path, "film", splits=0)


def test_planetoid(tmp_path: Path) -> None:
    put_cora(tmp_path)
    graph = load_graph(tmp_path, "cora", splits=2)
    assert graph.features.toarray().tolist()[3:] == [[3, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 5]]
    assert graph.labels.tolist() == [0, 1, 0, 0, -1, 1]
    assert graph.edges.tolist() == [[0, 0, 1, 2, 5], [1, 5, 0, 2, 0]]
    assert not graph.directed
    assert not graph.masks["val"][0, 4]  # a node without a label is in no mask
    assert graph.public_split["train"].tolist() == [0, 1]
    assert graph.public_split["test"].tolist() == [3, 5]


def test_npz(tmp_path: Path) -> None:
    masks = {f"{part}_masks": np.eye(3, dtype=bool)[i][None].repeat(2, 0) for i, part in enumerate(graphs.SPLIT_PARTS)}
    content = {
        "node_features": np.eye(3, dtype=np.float32),
        "node_labels": np.array([0, 1, 0]),
        "edges": np.array([[2, 0], [0, 1]]),
    }
    for name, edges in (("chameleon/chameleon_directed", 2), ("cornell_fixed", 4)):
        path = tmp_path / "geom_gcn" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **content, **masks)
        graph = load_graph(tmp_path, path.stem.removesuffix("_directed"), splits=2)
        assert graph.edges.shape[1] == edges
        assert graph.masks["test"].tolist() == [[False, False, True]] * 2
    with pytest.raises(UserError, match="holds 2 splits, asked for 3"):
        load_graph(tmp_path, "cornell_fixed", splits=3)
    np.savez(path, **(content | {"edges": np.array([[0, 7]])}), **masks)
    with pytest.raises(UserError, match=r"edge 1 is \(0, 7\), expected ids 0\.\.2"):
        load_graph(tmp_path, "cornell_fixed", splits=1)
    np.savez(path, **(content | {"node_features": np.eye(3) * np.nan}), **masks)
    with pytest.raises(UserError, match="a feature of node 0 is not finite"):
        load_graph(tmp_path, "cornell_fixed", splits=1)
    np.savez(path, edges=content["edges"])
    with pytest.raises(UserError, match="holds no array 'node_features'"):
        load_graph(tmp_path, "cornell_fixed", splits=1)
    path.write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"no readable \.npz"):
        load_graph(tmp_path, "cornell_fixed", splits=1)


TABLE, EDGES = "geom_gcn/texas/out1_node_feature_label.txt", "geom_gcn/texas/out1_graph_edges.txt"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (TABLE, "h\n0\t1,0\t0\n0\t1,1\t1\n", "1 distinct nodes on 2 lines"),
        (TABLE, "h\n0\t1,0\t0\n1\t1\t1\n", "line 3 has 1 features, the lines before it 2"),
        (TABLE, "h\n0\t1,x\t0\n", "line 2: no list of numbers"),
        (TABLE, "h\n0\t1\n", "line 2 has 2 fields between tabs, expected 3"),
        (TABLE, "h\n0\t1\t0\n1\t1\t2\n2\t0\t0\n3\t0\t0\n", r"labels are \[0, 2\], expected every one of 0..C-1"),
        (TABLE, "h\n0\t1\t0\n1\tnan\t1\n2\t0\t0\n3\t0\t0\n", "a feature of node 1 is not finite"),
        (EDGES, "h\n0\t9\n", r"edge 1 is \(0, 9\), expected ids 0\.\.3"),
        (EDGES, "h\n0\tone\n", "line 2: .*expected two node numbers"),
    ],
)
def test_bad_text(tmp_path: Path, name: str, text: str, message: str) -> None:
    put_texas(tmp_path)
    put(tmp_path, name, text)
    with pytest.raises(UserError, match=message):
        load_graph(tmp_path, "texas", splits=1)


def test_bad_splits(tmp_path: Path) -> None:
    put_texas(tmp_path)
    put_splits(tmp_path, "texas", 4, val_mask=np.zeros(3, bool))
    with pytest.raises(UserError, match=r"val mask has shape \(3,\), expected \(4,\)"):
        load_graph(tmp_path, "texas", splits=1)
    put_splits(tmp_path, "texas", 4, test_mask=np.ones(4, bool))
    with pytest.raises(UserError, match="node 0 is in the train and in the test mask"):
        load_graph(tmp_path, "texas", splits=1)
    put_splits(tmp_path, "texas", 4, train_mask=np.zeros(4, bool))
    with pytest.raises(UserError, match="the train mask is empty"):
        load_graph(tmp_path, "texas", splits=1)
    with pytest.raises(UserError, match="test mask is empty"):
        check_masks({part: np.array([part != "test"]) for part in graphs.SPLIT_PARTS}, "here")
    with pytest.raises(UserError, match=r"no file texas_split_0\.6_0\.2_2\.npz; expected at .*splits"):
        load_graph(tmp_path, "texas", splits=3)


class Evil:
    """Runs a command when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("echo pwned",)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"allx": Evil()}, "not allowed"),
        ({"tx": np.zeros((2, 4))}, "expected a scipy sparse matrix"),
        ({"ty": [1, 2]}, "expected one-hot labels"),
        ({"graph": [[1], [0]]}, "expected a dict of neighbour lists"),
        ({"graph": {0: [99]}}, r"edge 1 is \(0, 99\)"),
        ({"tx": csr_matrix(np.ones((1, 4), np.float32))}, "names 2 nodes, tx has 1"),
        ({"allx": csr_matrix(np.ones((2, 4), np.float32))}, "begins at node 3, expected 2"),
        ({"tx": csr_matrix(np.ones((2, 5), np.float32))}, "other widths"),
    ],
)
def test_bad_planetoid(tmp_path: Path, parts: dict[str, object], message: str) -> None:
    put_cora(tmp_path, **parts)
    with pytest.raises(UserError, match=message):
        load_graph(tmp_path, "cora", splits=0)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pubmed: no file ind\.pubmed\.x; expected at .*; put the eight Planetoid"):
        load_graph(tmp_path, "pubmed")
    with pytest.raises(UserError, match=r"texas: no file out1_node_feature_label\.txt; expected at .*geom_gcn/texas"):
        load_graph(tmp_path, "texas")
    with pytest.raises(UserError, match="unknown graph 'karate'"):
        load_graph(tmp_path, "karate")
    with pytest.raises(UserError, match="11 splits"):
        load_graph(tmp_path, "texas", splits=11)
    assert available(tmp_path) == []


def test_small_pieces() -> None:
    edges = distinct_edges(np.array([2, 0, 2]), np.array([1, 0, 1]), 3)
    assert edges.tolist() == [[0, 2], [0, 1]]
    lonely = Graph("lonely", csr_matrix((2, 1), dtype=np.float32), np.array([0, 1]), np.zeros((2, 0), np.int64), True)
    assert lonely.homophily() == 0.0
    assert lonely.counts() == {"nodes": 2, "features": 1, "classes": 2, "edges": 0, "loops": 0}
