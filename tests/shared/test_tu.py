"""shared.tu: the small published sets, both layouts written here, a peer, and what is wrong with bad files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from shared.tu import EXPECTED, check_tu, load_tu

# Three graphs: a path of three nodes, a pair, one lonely node.
PARTS = {
    "A": "1, 2\n2, 1\n2, 3\n3, 2\n5, 4\n4, 5\n",
    "graph_indicator": "1\n1\n1\n2\n2\n3\n",
    "graph_labels": "2\n-1\n2\n",
    "node_labels": "3\n1\n1\n5\n1\n3\n",
    "node_attributes": "0.5, 1\n0, 2\n1.5,3\n0, 4\n0, 5\n0, 6\n",
    "edge_labels": "0\n0\n1\n1\n0\n0\n",
}
SINGLE = "3\n3 2\n3 1 1\n1 2 0 2\n1 1 1\n2 -1\n5 1 1\n1 1 0\n1 2\n3 0\n"


def put(folder: Path, **parts: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in (PARTS | parts).items():
        if text is not None:
            (folder / f"TOY_{part}.txt").write_text(text)


@pytest.mark.parametrize("place", ["TOY", "TOY/raw", "raw", "."])
def test_collection_layout(tmp_path: Path, place: str) -> None:
    put(tmp_path / place)
    graphs = load_tu(tmp_path, "TOY")
    assert graphs.edges.tolist() == [[0, 1, 1, 2, 4, 3], [1, 0, 2, 1, 3, 4]]  # in the order of the file
    assert graphs.node_graph.tolist() == [0, 0, 0, 1, 1, 2]
    assert graphs.ptr.tolist() == [0, 3, 5, 6]
    assert graphs.sizes().tolist() == [3, 2, 1]
    assert graphs.graph_labels.tolist() == [1, 0, 1]
    assert graphs.label_values.tolist() == [-1, 2]
    assert graphs.original_labels.tolist() == [2, -1, 2]
    assert graphs.node_labels.tolist() == [3, 1, 1, 5, 1, 3]
    assert graphs.edge_labels.tolist() == [0, 0, 1, 1, 0, 0]
    assert graphs.node_attributes.dtype == torch.float32
    assert graphs.features()[0].tolist() == [0.5, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert (len(graphs), graphs.nodes, graphs.classes, graphs.layout) == (3, 6, 2, "tu")
    assert graphs.counts() == {
        "graphs": 3,
        "classes": 2,
        "nodes_per_graph": 2.0,
        "edges_per_graph": 1.0,
        "label_width": 5,
    }
    assert graphs.origin()["TOY_A.txt"] == hashlib.sha256(PARTS["A"].encode()).hexdigest()
    assert len(graphs.origin()) == 6


def test_optional_files(tmp_path: Path) -> None:
    put(tmp_path, node_labels=None, node_attributes=None, edge_labels=None)
    graphs = load_tu(tmp_path, "TOY")
    assert graphs.node_labels is None
    assert graphs.node_attributes is None
    assert graphs.edge_labels is None
    assert graphs.features().shape == (6, 0)
    assert len(graphs.files) == 3


def test_one_file(tmp_path: Path) -> None:
    put(tmp_path / "many", node_attributes=None, edge_labels=None)
    (tmp_path / "TOY.txt").write_text(SINGLE)
    one, many = load_tu(tmp_path, "TOY"), load_tu(tmp_path / "many", "TOY")
    assert one.layout == "dgcnn"
    for field in ("node_graph", "ptr", "graph_labels", "label_values", "node_labels"):
        assert torch.equal(getattr(one, field), getattr(many, field)), field
    assert sorted(one.edges.t().tolist()) == sorted(many.edges.t().tolist())
    (tmp_path / "TOY.txt").write_text("1\n2 0\n7 1 1 0.5 -1\n7 1 0 1e3 2\n\n")
    assert load_tu(tmp_path, "TOY").node_attributes.tolist() == [[0.5, -1.0], [1000.0, 2.0]]


@pytest.mark.parametrize("name", ["MUTAG", "NCI1", "PROTEINS", "PTC_MR", "IMDB-BINARY"])
def test_published_files(data_root: Path, name: str) -> None:
    folder = data_root / "tu-graphs"
    if not (folder / f"{name}.txt").is_file():
        pytest.skip(f"{name} is not in {folder}")
    graphs = load_tu(folder, name)
    assert len(graphs) == EXPECTED[name]["graphs"]
    assert int(graphs.ptr[-1]) == graphs.nodes == len(graphs.node_labels)
    assert (graphs.edges[0] != graphs.edges[1]).all()
    assert not any("expected" in line for line in check_tu(folder, name))
    if name == "MUTAG":
        assert graphs.original_labels.bincount().tolist() == [63, 0, 125]
        assert int(graphs.sizes().max()) == 28


def test_peer_reads_the_same(tmp_path: Path) -> None:
    """torch-geometric's reader of the collection's layout."""
    read = pytest.importorskip("torch_geometric.io", reason="torch-geometric is not installed").read_tu_data
    put(tmp_path)
    data, slices, _ = read(str(tmp_path), "TOY")
    graphs = load_tu(tmp_path, "TOY")
    assert torch.equal(data.x, graphs.features())
    assert torch.equal(data.y, graphs.graph_labels)
    assert torch.equal(slices["x"], graphs.ptr)
    local = graphs.edges - graphs.ptr[graphs.node_graph[graphs.edges[0]]]
    assert sorted(data.edge_index.t().tolist()) == sorted(local.t().tolist())


def test_check(tmp_path: Path) -> None:
    put(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.name.replace("TOY", "MUTAG"))
    lines = check_tu(tmp_path, "MUTAG")
    assert lines[1] == "  1 of class -1, 2 of class 2"
    assert "  graphs                   3   expected 188" in lines
    assert "  classes                  2" in lines


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("A", "1, 2\n2, 1\n1, 7\n7, 1\n", r"edge 3 is \(1, 7\), expected node numbers 1 to 6"),
        ("A", "1, 2\n2, 1\n0, 1\n1, 0\n", r"edge 3 is \(0, 1\)"),
        ("A", "1, 2\n2, 1\n3, 4\n4, 3\n", "edge 3 joins graphs 1 and 2"),
        ("A", "1, 2\n2, 1\n4, 5\n", r"edge 3 \(graph 2\) is listed from one end only"),
        ("A", "1, 2\n2, x\n", "TOY_A.txt: .*' ?x'"),
        ("A", "1, 2, 3\n", "has 3 numbers a line, expected 2"),
        ("graph_indicator", "1\n1\n1\n3\n3\n3\n", "graph 2 has no node"),
        ("graph_indicator", "1\n1\n1\n2\n2\n4\n", "line 6: graph 4, expected 1 to 3"),
        ("graph_indicator", "1\n1\n2\n1\n2\n3\n", "line 4: the graphs are not in order"),
        ("graph_labels", "", "line 1: graph 1, expected 1 to 0"),
        ("node_labels", "1\n2\n", "node_labels.txt has 2 lines, expected 6"),
        ("edge_labels", "1\n2\n", "edge_labels.txt has 2 lines, expected 6"),
        ("node_attributes", "1\n2\n", "node_attributes.txt has 2 lines, expected 6"),
        ("node_attributes", "1\n1\n1\n1\nnan\n1\n", r"node 5 \(graph 2\) is not finite"),
    ],
)
def test_bad_parts(tmp_path: Path, part: str, text: str, message: str) -> None:
    put(tmp_path, **({"edge_labels": None} | {part: text}))
    with pytest.raises(UserError, match=message):
        load_tu(tmp_path, "TOY")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 has 0 numbers"),
        ("2 3\n", "line 1 has 2 numbers, expected one"),
        ("0\n", "the set has no graph"),
        ("1\n2 0\n0 1 1\n0 1 x\n", "line 4: .*'x'"),
        ("1\n2 0\n0 1 1\n0 1 0.5\n", "line 4: 0.5, expected an integer"),
        ("1\n2\n", "line 2: 1 numbers, expected nodes and class"),
        ("1\n0 1\n", "line 2: graph 1 has 0 nodes"),
        ("2\n1 0\n0 0\n", "ends within graph 1, expected 2 graphs"),
        ("1\n2 0\n0 0\n", "ends within graph 1: 3 lines, expected 4"),
        ("1\n1 0\n0 0\n0 0\n", "goes on after graph 1: 4 lines, expected 3"),
        ("1\n1 0\n0\n", "line 3: expected a label and a number"),
        ("1\n2 0\n0 3 1\n0 1 0\n", "line 3: 3 numbers do not fit"),
        ("1\n2 0\n0 1 2\n0 1 0\n", "graph 1 has neighbour 2, expected 0 to 1"),
        ("1\n2 0\n0 1 1\n0 0\n", r"edge 1 \(graph 1\) is listed from one end only"),
    ],
)
def test_bad_single_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "TOY.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        load_tu(tmp_path, "TOY")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no graph set TOY in .*, expected TOY/TOY_A\.txt and its companions, or TOY"):
        load_tu(tmp_path, "TOY")
    put(tmp_path, graph_labels=None)
    with pytest.raises(UserError, match=r"no file .*TOY_graph_labels\.txt, expected beside TOY_A\.txt"):
        load_tu(tmp_path, "TOY")
