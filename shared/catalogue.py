"""Where the papers' data sets come from: files, checksums, licences, and the steps for what a program may not fetch.

``tools/fetch_data.py`` reads this. Paths are relative to the folder the user chooses (``--dest``), which then is what a
paper takes as ``--data``: all graph sets share one folder, point clouds and click logs lie in a folder of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class File:
    """One file to fetch.

    ``checksum`` is ``"sha256:<hex>"``, or ``"git:<hex>"`` (the id git gives the content, SHA-1 over a header and the
    bytes) where only that is known, or None. ``size`` is in bytes, None when unknown. ``url`` is None for a file that
    the user must fetch; it is then looked for at ``path``.
    """

    path: str
    url: str | None = None
    checksum: str | None = None
    size: int | None = None
    unpack: Unpack | None = None


@dataclass(frozen=True)
class Unpack:
    """How an archive becomes the layout a loader reads.

    What lies below ``strip`` in the archive (everything when it is empty) becomes the folder, or for a single
    compressed file the file, ``to``. ``limit`` bounds the unpacked bytes.
    """

    kind: Literal["zip", "tar", "gz"]
    to: str
    strip: str = ""
    limit: int = 4 * GIB


@dataclass(frozen=True)
class DataSet:
    """One entry of the catalogue.

    ``holds`` are glob patterns that must all match below the folder once the set is complete; ``folder`` is the part
    of it that a paper takes as ``--data``. ``download`` tells the size in words; ``by_hand`` are the steps for what
    sits behind a registration or licence click.
    """

    name: str
    title: str
    licence: str
    home: str
    papers: tuple[str, ...]
    download: str
    holds: tuple[str, ...]
    files: tuple[File, ...] = ()
    by_hand: tuple[str, ...] = ()
    note: str = ""
    folder: str = ""


PLANETOID = "https://raw.githubusercontent.com/kimiyoung/planetoid/af6abf468a772cc055bec88c52e4d6f51b7c37e3/data"
GEOM_GCN = "https://raw.githubusercontent.com/graphdml-uiuc-jlu/geom-gcn/f1fc0d14b3b019c562737240d06ec83b07d16a8f"
HETEROPHILOUS = (
    "https://raw.githubusercontent.com/yandex-research/heterophilous-graphs"
    "/a431395582e929d88271309716bea4fe24ce6318/data"
)

_GRAPH_CHECKSUMS = """
23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab 22119 planetoid/ind.cora.x
94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1 4054 planetoid/ind.cora.y
b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a 148025 planetoid/ind.cora.tx
41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad 28135 planetoid/ind.cora.ty
9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543 257305 planetoid/ind.cora.allx
2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71 47959 planetoid/ind.cora.ally
58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d 59847 planetoid/ind.cora.graph
297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875 5000 planetoid/ind.cora.test.index
d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6 31087 planetoid/ind.citeseer.x
8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924 3014 planetoid/ind.citeseer.y
539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21 260321 planetoid/ind.citeseer.tx
55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce 24135 planetoid/ind.citeseer.ty
2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668 595021 planetoid/ind.citeseer.allx
f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95 55623 planetoid/ind.citeseer.ally
d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7 61987 planetoid/ind.citeseer.graph
2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4 5000 planetoid/ind.citeseer.test.index
fbe9cb5c47200d1b7769a26e579be3b7130b556831f9d850e77c4c74f2599b33 23172 planetoid/ind.pubmed.x
e6c807633307a07ed659249006536a147c7999c797f11a2560752990181b41b3 854 planetoid/ind.pubmed.y
4eb5f5d0f30f26497eb0ac6ac9719d09c67e284f1ed0385c93f3ef27a671da3d 405505 planetoid/ind.pubmed.tx
ee2e0d4819d9fbcc403689c3bf2e49face401b605932f093bc58ab6461130fdd 12135 planetoid/ind.pubmed.ty
git:3b86bccf08111c37c632a9dd8ab63db25ea76361 - planetoid/ind.pubmed.allx
0c37bbe3b5014ec365e9d393cf4791925e5ed94fb194305d74f064a8d7b50f0e 224739 planetoid/ind.pubmed.ally
5b89f0036ca22909471f1e6558eb42fa06e0c730a577bde5b058b40638f81dc9 471808 planetoid/ind.pubmed.graph
b101d421688bbaecbd82e8a18f1e282378d6830f3a37666f28ebc47f844341b5 6000 planetoid/ind.pubmed.test.index
0fe85183243a78cbee9b85a684f8240963d04d1020d10e9cd2b8cfb25e33b476 2172 geom_gcn/texas/out1_graph_edges.txt
cf5a3ca346cdd1210b8342e22517fcbbdae658065b7a3145f59350e50e6236a3 624308 geom_gcn/texas/out1_node_feature_label.txt
ebd213511c88fce1eda450c2f920600c4b8cbb38f02384856bcc47c6ec1807ae 3606 geom_gcn/wisconsin/out1_graph_edges.txt
a32b0aa38d42f0d36841e8a8cb646d197f0ff33a182ac75a2b4476aeed3c7e4b 856324 geom_gcn/wisconsin/out1_node_feature_label.txt
c4522a00cc40873c8a04a3a07c49e24a48a507eb284ac9c9f2d3e0590351bbb7 2001 geom_gcn/cornell/out1_graph_edges.txt
cf5a3ca346cdd1210b8342e22517fcbbdae658065b7a3145f59350e50e6236a3 624308 geom_gcn/cornell/out1_node_feature_label.txt
997cdce67ea9c29257d3ffe796328391931901cf823830affa453178b60e2c3e 323820 geom_gcn/film/out1_graph_edges.txt
1d5cdd094f8b91e770f6decfca85b35cf42f75d1efb51055fd6af16e11820ff8 207718 geom_gcn/film/out1_node_feature_label.txt
45ac593de9207470090230c8fd76beeb2f60b5371a9be088e8bf31e7f0619a4b 332448 geom_gcn/chameleon/out1_graph_edges.txt
git:38132ed8eeb881869f8b858c9f068834b34b7ad6 - geom_gcn/chameleon/out1_node_feature_label.txt
453d8e96754d68e2ab0a7ebb56f93506b59531d95abaec7a2b46fe1eae7c39cd 2115917 geom_gcn/squirrel/out1_graph_edges.txt
git:fd59ff82789101155ca1a05d402b4769ff51aaf7 - geom_gcn/squirrel/out1_node_feature_label.txt
619931e6c3f0248bf9c7b6be24680a0a617bcfaba661cb0d7afaee8e18a74a51 1989 splits/cora_split_0.6_0.2_0.npz
d24be667034cb15a55bbf512dbae07b39c758eed66a9ba27106fa795422fe11c 1958 splits/cora_split_0.6_0.2_1.npz
811fb695c4c9ab0a53ab3a665bf4232652a08a6e38faac5b43a7da43a8454b74 1967 splits/cora_split_0.6_0.2_2.npz
9d9c19d88a689b76a4b97e8694ef8d20cb0f1b192bbd05a0d5649c91f0cb6ef4 1956 splits/cora_split_0.6_0.2_3.npz
3040b6bc0ddfff3757d55f514becf0b1b6b2e382114bfb0bc900dbcbb58fca17 1942 splits/cora_split_0.6_0.2_4.npz
52373862971060e366829930332acabaa90cc6f41019c52bf6c92e4c22f8f093 2008 splits/cora_split_0.6_0.2_5.npz
07847ea94e8b19970cf86731f19869aac0c56310d27f687d0feb9553d7525dd6 1944 splits/cora_split_0.6_0.2_6.npz
262573079c8b1f4bc043d32edd3d23a6c36f1d7258efe60c11a6197ba0eee560 1962 splits/cora_split_0.6_0.2_7.npz
d6c6a2163aeadd103ae386e800e473d2388da866f3f464199180d9b0e2f7d6cc 1956 splits/cora_split_0.6_0.2_8.npz
9d236d0cf723871d88dea567afe92d50c11d0ffba280349a5cc7f5f2ea42202f 1948 splits/cora_split_0.6_0.2_9.npz
31d483e4c9cbdd031c35e284fbda3935bfda6901b8618e4ef0381af5b9143582 2266 splits/citeseer_split_0.6_0.2_0.npz
1e02e3220676a90715b5a868b207dc19f49e5bc13ef1e8a8c8305fb46e028659 2284 splits/citeseer_split_0.6_0.2_1.npz
910ce9d1a9c12f2ce84486fa7d1953d560c2cf57f9e0c213a4ae362ca56bff77 2261 splits/citeseer_split_0.6_0.2_2.npz
e8c84d2e0099b3c0d692a68126c03370579f0cd83c0dab42b25a0fb3b94cb2c6 2278 splits/citeseer_split_0.6_0.2_3.npz
a45c9e6b4abe527499a1a1bf545063cdc910c82ef4676f1ef4e483bb77712c8e 2122 splits/citeseer_split_0.6_0.2_4.npz
fc0f6091daab2b0f37a3522dbc60052d9bce4209e7c06482f6beb61a4ed442b9 2123 splits/citeseer_split_0.6_0.2_5.npz
c99f610ff84bf5f5c3fe71b548c3cdf9c9bf02185d0152432b290877df1c4a3b 2260 splits/citeseer_split_0.6_0.2_6.npz
26bb7e5ea3aed014df5765af845fae70db9cdbb8875c46fc89cc4d6d042fb182 2269 splits/citeseer_split_0.6_0.2_7.npz
f8efadce7a3732ac39ec6625f591c9ed0b4222d95257f25f2a05ad5518e4a7eb 2261 splits/citeseer_split_0.6_0.2_8.npz
d9e586dad1886b3e1fdf3999140a192bb0cacea67c7849262ec862b8e7286cdf 2278 splits/citeseer_split_0.6_0.2_9.npz
a15825b5bf77ffd2e9179e354f455bb9a6f8c4886cb28796688a38d45d75bdc9 9669 splits/pubmed_split_0.6_0.2_0.npz
51f2349156410d851859ff4858ecd401d05d024f1a3936250dd8e844a6fd527b 9664 splits/pubmed_split_0.6_0.2_1.npz
d94a2a3d607f23d7dc88dabb966db7c7da187e0a2af3c848d88ab0c5452c4a2b 9706 splits/pubmed_split_0.6_0.2_2.npz
62c389ddac567fcd25654db846fc693973c69cddf083f5495d33b592a768515e 9653 splits/pubmed_split_0.6_0.2_3.npz
3b2bbeb2f4bbee257bb4c626c15c3e3dd0e9da6ed23bf16f6ac520b95e18f84d 9705 splits/pubmed_split_0.6_0.2_4.npz
23aea01576f71aa165cd70564fb53b3f158d1ff71c1227e062797870fe130551 9640 splits/pubmed_split_0.6_0.2_5.npz
9122bd4e8e42cab8d33e952693d18d0f49c5f11327b922baefb81228ee903c44 9701 splits/pubmed_split_0.6_0.2_6.npz
958706e960939c716a5204671c08399864600ce82094755b2e61975137ccfae9 9710 splits/pubmed_split_0.6_0.2_7.npz
764dd33802022d7ab2595f08f21b424e83007aceeb5f85c9403c74bf791f56f6 9705 splits/pubmed_split_0.6_0.2_8.npz
b9d4b4362fc02751c168f68f4120ab2fb516f4c84d447571653f1cd692946a66 9704 splits/pubmed_split_0.6_0.2_9.npz
7ba77bf7a8856fcc0ab15623a611b8cdce994e820f577da914123fb4f45272b0 698 splits/texas_split_0.6_0.2_0.npz
21cc244a96e3c51ad7993afb4dd227f90e467d82b964bb42d7d9fc500a6ef87f 701 splits/texas_split_0.6_0.2_1.npz
b9e96a699ccf3a4c31ffbd03e52b25570889833425d20fa44e06c37b327cf61e 756 splits/texas_split_0.6_0.2_2.npz
1a7deeb1285009789d5e6045d7e39f7d019c9223d9a75a2b7ce5e26d33b51f63 759 splits/texas_split_0.6_0.2_3.npz
b5419ff3fe31adcae66fdb085d4f47d0b188e9436ab59f438632af969aafc674 702 splits/texas_split_0.6_0.2_4.npz
68405fd1b9ff6105d99717220ecbd198785e338bf4a73abee722bbc9703d2667 691 splits/texas_split_0.6_0.2_5.npz
8ad78b973164e70e5ac0d282e79adcbc6006e373909fbdfd72a13131e09040b8 756 splits/texas_split_0.6_0.2_6.npz
a84bcbf997365bddf5fdf72ed49dc7e435e475f8c6210f8cdee7c8581a2bd6df 693 splits/texas_split_0.6_0.2_7.npz
65ba65f296f91d40d2d7d3c9369b67415094a7e254c6eee48cd6d6531c586fdf 762 splits/texas_split_0.6_0.2_8.npz
4306981d654ad8835c000c1f73fb6c1e60dfe99e26c13a6073f3b0f4cc3ce6ee 693 splits/texas_split_0.6_0.2_9.npz
f66f641e191d35d491cd3b63d6c2cd93c4b436da398984b44c19a8d4d7e7b1a5 805 splits/wisconsin_split_0.6_0.2_0.npz
534aeb97266bd5a85a8587adf8eebad3f2e001c1240610f24b62c0ad0c2466ee 739 splits/wisconsin_split_0.6_0.2_1.npz
047a5b641778ec3a4c76055fd7f18ecb2424c0952f20dfff7e1b17749d8acbdd 747 splits/wisconsin_split_0.6_0.2_2.npz
706c27b4c51d046c0316f1e915f093e4a1fff48b3436b3e7c421eab596a99e77 810 splits/wisconsin_split_0.6_0.2_3.npz
7ee813605eec086457aaff022cf3837f2f893fcf8bd37e3a8d2ff0c80e4c4f87 812 splits/wisconsin_split_0.6_0.2_4.npz
8094ac2bdaf2cbea8f7a48df66a0800c809b2fd5942740e6b0441b660d3a0dd5 749 splits/wisconsin_split_0.6_0.2_5.npz
c423a8deea9b18f9ecb6cfd703578e2159df167de01fe7e6195b88995010252d 735 splits/wisconsin_split_0.6_0.2_6.npz
57ad808c8d4dd94dc4404124370bbcebb3dcc597c2bea6457bf05f220adf1527 733 splits/wisconsin_split_0.6_0.2_7.npz
27d4d62a2a6aea2cdc399302237512ab0d64fb0c84e648112f97c5896274e42f 741 splits/wisconsin_split_0.6_0.2_8.npz
3c149cd124a19021031609e0d7743a7be59aae4f88c8d38410138e8f06f5daaf 744 splits/wisconsin_split_0.6_0.2_9.npz
14022a1e19ec7fc0a07a2c06a785a2f9dc52809dbcd1c14fc318f7800675d73f 704 splits/cornell_split_0.6_0.2_0.npz
5568fa27e968a724c92211bf97026a36a08893cf94b218043e49b4c973c35cfb 700 splits/cornell_split_0.6_0.2_1.npz
763fc1f423395e4172617fa5b6bc0d7adad2241e5fedd1a4f0a098a67f9dc8e9 695 splits/cornell_split_0.6_0.2_2.npz
4334321cd9ec42de9d51107fb9a6dc310512e0921bc1cff0f390301ee37315fa 701 splits/cornell_split_0.6_0.2_3.npz
2b6b3ef396f4dc7fcdc276fb16b88bb87409b25879dd672b3a506eca844dd8d7 759 splits/cornell_split_0.6_0.2_4.npz
1a40ef8b20aa9e1aa850e1abdaba3efac1f66c98ef2c6a59eadefa21136ece6b 754 splits/cornell_split_0.6_0.2_5.npz
bcddf4ab59eae4c7d47b8a6cec9025a54ec0e6d3f3bdcd7678e201f25ace4642 758 splits/cornell_split_0.6_0.2_6.npz
2b497e12dfc123d7e7c9bb4fc4a82b5bee18409e109a3e3a04da439cacec964d 693 splits/cornell_split_0.6_0.2_7.npz
5c4e110d252d7ad156b2e4cd34b6dbd1cecbcc1755f8d72e932cc2a54f2b643c 701 splits/cornell_split_0.6_0.2_8.npz
80f1531807194d301affbf6f879a4ab4f56a19bdccb62d192e3ecd1b5275f052 704 splits/cornell_split_0.6_0.2_9.npz
4505a41d4e90abd94d1ec22571ce528b09ad7cf20d87f764aebd4177590767f5 4214 splits/film_split_0.6_0.2_0.npz
1871b0d24e3977c41e378fd24acc8025b63f86b77739be77a5b558d1287f207d 4231 splits/film_split_0.6_0.2_1.npz
d26680e911ef3ecc9fc2a26d90c9d35028c63aadd7a5aea774649d1496c282cb 4224 splits/film_split_0.6_0.2_2.npz
6755ad5f6a0be8594b344af3d2261eed935b83b73c4d70136e1a7beea7f78cb0 4207 splits/film_split_0.6_0.2_3.npz
328fdca62b25074f21f2922518e042f24b3b8a1fc378f9dfb2cae36439aed902 4233 splits/film_split_0.6_0.2_4.npz
5b3161a8dc8de4b2e651ebd56d68e768d1377044895b325566117fe26ab81cb7 4224 splits/film_split_0.6_0.2_5.npz
e251b38abd4d7931b5e9ae5aba99dcdf87f0be283bdf6e65421274a1c9ef1df6 4221 splits/film_split_0.6_0.2_6.npz
12164ef9f5620a2f12a387f4f2b8636859d42201101d6d32829ade62d5a98326 4205 splits/film_split_0.6_0.2_7.npz
405cd1f7f631f678119f8bf2405809e86614d532985beb59566fcf95abd35b3f 4217 splits/film_split_0.6_0.2_8.npz
505691c5d41bb37b20d085415dcdde2e8e68b5bc4e1feb2c0e361308002012bb 4208 splits/film_split_0.6_0.2_9.npz
36605525b69be4e7df5b31fe6a1d044288c6ebf9f9f0514ca151f6a36afc5e8b 1775 splits/chameleon_split_0.6_0.2_0.npz
d0779d5a1bedf1967d394468a52c0175fb00595d361fba897faf73322386c952 1779 splits/chameleon_split_0.6_0.2_1.npz
86ad0d827bf4301dff830598fc0b70d0dd8689c5b4d72dab1d87a6c1970c4c6e 1777 splits/chameleon_split_0.6_0.2_2.npz
37b3e994adf3afc55e16b617ed05af4e3ce308800755839084d77eced0528e9d 1755 splits/chameleon_split_0.6_0.2_3.npz
f6b1d067b2b330132839d8b6120077bdc6cf759f7ce421f881a02e2953ec4596 1778 splits/chameleon_split_0.6_0.2_4.npz
e7661834275c826692510cea0457b18b2c1ee38771f178d06e701b97541a1f6d 1772 splits/chameleon_split_0.6_0.2_5.npz
16648d1197c1d3a2dec385346212c382030b0d5a8c997f4255aa2afa68a6b174 1774 splits/chameleon_split_0.6_0.2_6.npz
61adcc53846becefecd466a5364dda23b983d387d1ac5d58c6e24d080c0fcba7 1764 splits/chameleon_split_0.6_0.2_7.npz
7076ad5341a8218b1f5b6eccf9cfd15d28286ea11ef5c06eeee77af24ff2bf63 1770 splits/chameleon_split_0.6_0.2_8.npz
743c4f813bf6130398a6511eb9ff07d2366c73bd6c7fddaf226a3f9e2917e0e7 1773 splits/chameleon_split_0.6_0.2_9.npz
f112b88d3354e86d164d4d915b6a1f695c10f0e01e3e6b9893fc7b09bb93191d 3134 splits/squirrel_split_0.6_0.2_0.npz
2486c687c8befb55930a6237f76f1d86ce2ba345782eda6157f4e752d05f304f 3130 splits/squirrel_split_0.6_0.2_1.npz
d62ff83862ad96022d3400dfc9b7ca405834ca62767319d97c36b3f02db978c0 3121 splits/squirrel_split_0.6_0.2_2.npz
af3d90e0b2718ac7417e10e8b5b382443667412e846cabc3cc4e4a592f4cedae 3126 splits/squirrel_split_0.6_0.2_3.npz
fbe848298bb72b88db0704050cf216e2a93c916540d577906f3e644b679a6a2c 3124 splits/squirrel_split_0.6_0.2_4.npz
cd04fab46a181151ddd97ce93c65fe79558fb79ffa230b62f488ebfaf5fdcd75 3111 splits/squirrel_split_0.6_0.2_5.npz
b9189f7903ca7556a025c54dd5be6c00ec5952d4299e71630bc9876157676412 3118 splits/squirrel_split_0.6_0.2_6.npz
ea7fb3ca5d5aa45b917b99fb7d64d4e87322b2b5303a0156c547aa3f1a6c8941 3138 splits/squirrel_split_0.6_0.2_7.npz
b43faa190ca6dd4885a39dfc2a93d59f56f5174f3567bdbc49b18dd9cd9b7fb4 3132 splits/squirrel_split_0.6_0.2_8.npz
529ade4b86fd191908a96011f25c454653083674b6d4f090b3fdd27af2d14f62 3146 splits/squirrel_split_0.6_0.2_9.npz
684c54ba3daa13b0ba1f04a3d6dd1b1175c1ae9bdeb982851fd4ff96d3aac298 30515 geom_gcn/cornell_fixed.npz
34aea6b6888063544232100d53d4aa7e87e37953ec8dd3a7092afb25bb2f0328 191520 geom_gcn/chameleon/chameleon_directed.npz
3f0436486716cf77b651c372e54f6b4c2cc52262e7faeeab584a34b41bae2616 760119 geom_gcn/squirrel/squirrel_directed.npz
"""
"""``checksum size path``: SHA-256 (or ``git:`` id where only that is known), bytes, place below ``--dest``."""


def _graph_url(path: str) -> str:
    folder, _, name = path.rpartition("/")
    if folder == "planetoid":
        return f"{PLANETOID}/{name}"
    if folder == "splits":
        return f"{GEOM_GCN}/splits/{name}"
    if name == "cornell_fixed.npz":
        return f"{HETEROPHILOUS}/cornell.npz"
    if name.endswith(".npz"):
        return f"{HETEROPHILOUS}/{name}"
    return f"{GEOM_GCN}/new_data/{folder.removeprefix('geom_gcn/')}/{name}"


def _graph_file(line: str) -> File:
    checksum, size, path = line.split()
    return File(
        path=path,
        url=_graph_url(path),
        checksum=checksum if checksum.startswith("git:") else f"sha256:{checksum}",
        size=None if size == "-" else int(size),
    )


_GRAPH_FILES = tuple(_graph_file(line) for line in _GRAPH_CHECKSUMS.strip().splitlines())


def _graph(name: str, title: str, licence: str, home: str, papers: tuple[str, ...], note: str = "") -> DataSet:
    own = (f"planetoid/ind.{name}.", f"geom_gcn/{name}/out1_", f"geom_gcn/{name}.", f"geom_gcn/{name[:-9]}/{name}.")
    files = tuple(f for f in _GRAPH_FILES if f.path.startswith((*own, f"splits/{name}_split_")))
    known = [f.size for f in files if f.size is not None]
    words = f"{sum(known) / MIB:.2f} MiB" if len(known) == len(files) else f"more than {sum(known) / MIB:.2f} MiB"
    return DataSet(name, title, licence, home, papers, words, tuple(f.path for f in files), files, note=note)


_PLANETOID_HOME = "https://github.com/kimiyoung/planetoid"
_GEOM_GCN_HOME = "https://github.com/graphdml-uiuc-jlu/geom-gcn"
_YANDEX_HOME = "https://github.com/yandex-research/heterophilous-graphs"
_CITATION = "research use (Sen et al. 2008; Yang et al. 2016), repository MIT"
_WEBKB = "research use (WebKB, CMU), repository states none"
_WIKIPEDIA = "research use (Rozemberczki et al. 2021), repository states none"

_GRAPHS = (
    _graph("cora", "Cora, Planetoid files and ten splits", _CITATION, _PLANETOID_HOME, ("ggcn", "doscond")),
    _graph("citeseer", "Citeseer, Planetoid files and ten splits", _CITATION, _PLANETOID_HOME, ("ggcn", "doscond")),
    _graph("pubmed", "PubMed, Planetoid files and ten splits", _CITATION, _PLANETOID_HOME, ("ggcn", "doscond")),
    _graph("texas", "WebKB Texas and ten splits", _WEBKB, _GEOM_GCN_HOME, ("ggcn",)),
    _graph("wisconsin", "WebKB Wisconsin and ten splits", _WEBKB, _GEOM_GCN_HOME, ("ggcn",)),
    _graph(
        "cornell",
        "WebKB Cornell as first published, and ten splits",
        _WEBKB,
        _GEOM_GCN_HOME,
        ("ggcn",),
        note="its feature and label file is byte for byte that of Texas, as many published numbers used it; "
        "cornell_fixed is the proper graph",
    ),
    _graph("film", "Actor co-occurrence and ten splits", "research use (Tang et al. 2009)", _GEOM_GCN_HOME, ("ggcn",)),
    _graph("chameleon", "Wikipedia chameleon and ten splits", _WIKIPEDIA, _GEOM_GCN_HOME, ("ggcn",)),
    _graph("squirrel", "Wikipedia squirrel and ten splits", _WIKIPEDIA, _GEOM_GCN_HOME, ("ggcn",)),
    _graph("cornell_fixed", "WebKB Cornell with its own features, splits inside", "MIT", _YANDEX_HOME, ("ggcn",)),
    _graph("chameleon_directed", "Wikipedia chameleon, directed, splits inside", "MIT", _YANDEX_HOME, ("ggcn",)),
    _graph("squirrel_directed", "Wikipedia squirrel, directed, splits inside", "MIT", _YANDEX_HOME, ("ggcn",)),
)

_SHAPES = (
    DataSet(
        name="modelnet40",
        title="ModelNet40 as 2,048 points a shape, HDF5",
        licence="academic research only (Princeton ModelNet)",
        home="https://modelnet.cs.princeton.edu",
        papers=("foldingnet",),
        download="about 416 MB",
        holds=("modelnet40_ply_hdf5_2048/ply_data_train*.h5", "modelnet40_ply_hdf5_2048/ply_data_test*.h5"),
        files=(
            File(
                "modelnet40_ply_hdf5_2048.zip",
                "https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip",
                unpack=Unpack("zip", "modelnet40_ply_hdf5_2048", strip="modelnet40_ply_hdf5_2048"),
            ),
        ),
    ),
    DataSet(
        name="modelnet10",
        title="ModelNet10 meshes, OFF",
        licence="academic research only (Princeton ModelNet)",
        home="https://modelnet.cs.princeton.edu",
        papers=("foldingnet", "svr_dispersion"),
        download="about 450 MB",
        holds=("ModelNet10/*/train/*.off", "ModelNet10/*/test/*.off"),
        files=(
            File(
                "ModelNet10.zip",
                "https://3dvision.princeton.edu/projects/2014/3DShapeNets/ModelNet10.zip",
                unpack=Unpack("zip", "ModelNet10", strip="ModelNet10", limit=8 * GIB),
            ),
        ),
    ),
    DataSet(
        name="shapenetpart",
        title="ShapeNet part segmentation, 2,048 points a shape, HDF5",
        licence="ShapeNet terms: non-commercial research and education",
        home="https://shapenet.org/terms",
        papers=("foldingnet",),
        download="about 346 MB",
        holds=tuple(f"shapenet_part_seg_hdf5_data/ply_data_{part}*.h5" for part in ("train", "val", "test")),
        files=(
            File(
                "shapenet_part_seg_hdf5_data.zip",
                "https://shapenet.cs.stanford.edu/media/shapenet_part_seg_hdf5_data.zip",
                unpack=Unpack("zip", "shapenet_part_seg_hdf5_data", strip="hdf5_data"),
            ),
        ),
    ),
    DataSet(
        name="shapenet",
        title="57,448 ShapeNet shapes, 2,048 points each",
        licence="ShapeNet terms: non-commercial research and education",
        home="https://shapenet.org/terms",
        papers=("foldingnet",),
        download="about 1.4 GB",
        holds=("shapenet57448xyzonly.npz",),
        files=(File("shapenet57448xyzonly.npz"),),
        by_hand=(
            "accept the ShapeNet terms at https://shapenet.org/terms",
            "open https://drive.google.com/uc?id=1sJd5bdCg9eOo3-FYtchUVlwDgpVdsbXB (linked by the authors' "
            "prepare_data.py) in a browser; the virus-scan page that Google shows first keeps programs out",
            "save it as {dest}/shapenet57448xyzonly.npz",
        ),
    ),
    DataSet(
        name="shapenet_renderings",
        title="ShapeNetCore v1 point clouds and renderings, thirteen classes",
        licence="ShapeNet terms: non-commercial research and education",
        home="https://github.com/ThibaultGROUEIX/AtlasNet",
        papers=("svr_dispersion",),
        download="tens of GB",
        holds=("ShapeNetV1PointCloud/*/*.points.ply.npy", "ShapeNetV1Renderings/*/*/rendering/00.png"),
        by_hand=(
            "accept the ShapeNet terms at https://shapenet.org/terms",
            "run the download scripts of https://github.com/ThibaultGROUEIX/AtlasNet (folder dataset)",
            "move ShapeNetV1PointCloud and ShapeNetV1Renderings into {dest}",
        ),
    ),
)

_NFM = (
    "https://raw.githubusercontent.com/hexiangnan/neural_factorization_machine"
    "/ca2a5d11b929816aa44c6e470e795af144608507/data/frappe"
)
_FRAPPE_CHECKSUMS = {
    "train": ("git:176b2aaf1f63dd13d3e66a5c17c8ec8186e91893", None),
    "validation": ("sha256:fdf4be563a7dd9b15f7a6e8b32671e90e6e7a2a2bd3af4e10bf13c5ad7e76e9e", 4_163_044),
    "test": ("sha256:a2ebaef3a9af8e55f8bb0d08bc4923965e42e43760ebd7635ac2f8c5db99e097", 2_081_389),
}

_CLICKS = (
    DataSet(
        name="frappe",
        title="Frappe app usage in libFM format, 288,609 rows",
        licence="research use (Baltrunas et al. 2015), repository states none",
        home="https://github.com/hexiangnan/neural_factorization_machine",
        papers=("xdeepint",),
        download="about 20 MB",
        holds=tuple(f"frappe/frappe.{part}.libfm" for part in _FRAPPE_CHECKSUMS),
        files=tuple(
            File(f"frappe/frappe.{part}.libfm", f"{_NFM}/frappe.{part}.libfm", checksum, size)
            for part, (checksum, size) in _FRAPPE_CHECKSUMS.items()
        ),
        folder="frappe",
    ),
    DataSet(
        name="criteo",
        title="Criteo display advertising challenge, 45,840,617 labelled rows",
        licence="Criteo AI Lab terms: research",
        home="https://ailab.criteo.com/ressources/",
        papers=("xdeepint",),
        download="about 4.6 GB",
        holds=("criteo/train.txt",),
        files=(File("dac.tar.gz", unpack=Unpack("tar", "criteo", limit=16 * GIB)),),
        folder="criteo",
        by_hand=(
            "open https://ailab.criteo.com/ressources/, choose the Kaggle display advertising data, accept the terms",
            "save the archive as {dest}/dac.tar.gz",
            "run this command again: it unpacks the archive to {dest}/criteo (train.txt, 11 GB)",
        ),
    ),
    DataSet(
        name="avazu",
        title="Avazu click-through challenge, 40,428,967 labelled rows",
        licence="Kaggle competition rules",
        home="https://www.kaggle.com/c/avazu-ctr-prediction/data",
        papers=("xdeepint", "future_gradient_descent"),
        download="about 1.1 GB",
        holds=("avazu/train.csv",),
        files=(File("train.gz", unpack=Unpack("gz", "avazu/train.csv", limit=8 * GIB)),),
        folder="avazu",
        by_hand=(
            "sign in at https://www.kaggle.com/c/avazu-ctr-prediction/data and accept the rules",
            "save train.gz in {dest} (or: kaggle competitions download -c avazu-ctr-prediction -f train.gz)",
            "run this command again: it unpacks the file to {dest}/avazu/train.csv (6 GB)",
        ),
    ),
    DataSet(
        name="ipinyou",
        title="iPinYou real-time bidding logs of 2013, prepared",
        licence="contest terms: research",
        home="https://contest.ipinyou.com",
        papers=("xdeepint",),
        download="about 6 GB, 14 GB once prepared",
        holds=("ipinyou/train.log.txt", "ipinyou/test.log.txt"),
        folder="ipinyou",
        by_hand=(
            "get ipinyou.contest.dataset.zip from https://contest.ipinyou.com or the mirror at UCL that "
            "https://github.com/wnzhang/make-ipinyou-data names",
            "clone https://github.com/wnzhang/make-ipinyou-data, link the logs as original-data, run `make all`",
            "copy its all/train.log.txt and all/test.log.txt to {dest}/ipinyou",
        ),
    ),
    DataSet(
        name="criteo_1tb",
        title="Criteo 1TB click logs, 24 days",
        licence="CC BY-NC-SA 4.0",
        home="https://ailab.criteo.com/ressources/criteo-1tb-click-logs-dataset-for-mlperf/",
        papers=("future_gradient_descent",),
        download="about 350 GB",
        holds=tuple(f"criteo_1tb/day_{day}" for day in range(24)),
        folder="criteo_1tb",
        by_hand=(
            "open https://ailab.criteo.com/ressources/ and accept the terms of the 1TB click logs",
            "fetch day_0.gz to day_23.gz and decompress them to {dest}/criteo_1tb/day_0 ... day_23",
        ),
    ),
)

_DRIVING = (
    DataSet(
        name="nuscenes",
        title="nuScenes v1.0 trainval: six cameras, LiDAR, boxes",
        licence="CC BY-NC-SA 4.0",
        home="https://www.nuscenes.org/nuscenes",
        papers=("cmt",),
        download="about 300 GB",
        holds=(
            "nuscenes/samples/LIDAR_TOP/*.pcd.bin",
            "nuscenes/v1.0-trainval/sample.json",
            "nuscenes/*infos_train.pkl",
        ),
        folder="nuscenes",
        by_hand=(
            "register at https://www.nuscenes.org/nuscenes and accept the terms of use",
            "fetch the ten trainval parts, the metadata and the maps; unpack all of them into {dest}/nuscenes",
            "write the info files with mmdetection3d: python tools/create_data.py nuscenes --root-path {dest}/nuscenes "
            "--out-dir {dest}/nuscenes --extra-tag nuscenes",
        ),
    ),
)


def _tu(name: str, graphs: int, download: str, papers: tuple[str, ...] = ("graphcl_augmentations",)) -> DataSet:
    return DataSet(
        name=name.lower(),
        title=f"{name} of the TU collection, {graphs:,} graphs",
        licence="free for research with citation (Morris et al. 2020), no licence stated for each set",
        home="https://chrsmrrs.github.io/datasets",
        papers=papers,
        download=download,
        holds=(f"{name}/{name}_A.txt", f"{name}/{name}_graph_indicator.txt", f"{name}/{name}_graph_labels.txt"),
        files=(
            File(
                f"{name}.zip",
                f"https://www.chrsmrrs.com/graphkerneldatasets/{name}.zip",
                unpack=Unpack("zip", name, strip=name),
            ),
        ),
    )


def _molecules(name: str, graphs: int) -> DataSet:
    folder = f"ogbg_mol{name}"
    return DataSet(
        name=f"ogbg-mol{name}",
        title=f"OGB mol{name}, {graphs:,} molecules and the scaffold split",
        licence="MIT",
        home="https://ogb.stanford.edu/docs/graphprop",
        papers=("doscond",),
        download="a few MB",
        holds=(f"{folder}/raw/edge.csv.gz", f"{folder}/split/scaffold/train.csv.gz"),
        files=(
            File(
                f"{name}.zip",
                f"https://snap.stanford.edu/ogb/data/graphproppred/csv_mol_download/{name}.zip",
                unpack=Unpack("zip", folder, strip=name),
            ),
        ),
    )


_BOTH = ("doscond", "graphcl_augmentations")
_GRAPH_SETS = (
    _tu("MUTAG", 188, "less than 1 MB", _BOTH),
    _tu("NCI1", 4110, "about 1 MB", _BOTH),
    _tu("PROTEINS", 1113, "less than 1 MB", _BOTH),
    _tu("DD", 1178, "about 6 MB", _BOTH),
    _tu("PTC_MR", 344, "less than 1 MB"),
    _tu("IMDB-BINARY", 1000, "less than 1 MB"),
    _tu("REDDIT-BINARY", 2000, "about 7 MB"),
    _molecules("hiv", 41127),
    _molecules("bbbp", 2039),
    _molecules("bace", 1513),
)

_RELIANT = "https://raw.githubusercontent.com/yushundong/RELIANT/f40292204d24e55b668f8b3948b14d4c01093125/data"
_RELIANT_FILES = {
    "bail/bail.csv": ("a47a42ac9b546a54c94ff39a33fa1fa7d0ccaa37", 820_405),
    "bail/bail_edges.txt": ("d1f789c0d2de6408de1189b1125810632d030503", None),
    "bail/split/train_split.npy": ("b9f98f6466c072ffd43a48a3fda1fdbfac7461c0", 45_424),
    "bail/split/val_split.npy": ("5542c74d86b17625c06d09f911cf0a3486eeeb3f", 30_336),
    "bail/split/test_split.npy": ("c65522d10900a4f5b0dbfefb1c8b6240f2f869ac", 75_632),
    "credit/credit.csv": ("8f8c017fdc9eb4d841736e5987d4df7083128416", 1_152_844),
    "credit/credit_edges.txt.zip": ("aaf99e278bbba85f40ad61d757d3b357cedfe7b1", None),
    "small/X.npz": ("21deb4a11526746d77957b3c440c7c837b3548e7", None),
    "small/edgelist.txt": ("2caacdc977ce716d994c91b69c56b3cd7fa418a4", 599_372),
    "small/labels.txt": ("869b146c2c007fc744078f217683c953e1051e9f", 383_130),
    "small/sens.txt": ("76e8424151c62dbf99330d2b960d4d92a2c09e1b", 383_130),
    "small/split/train_split.npy": ("4a3034591a0523b7e34a8ab4614e95ebe148787d", 157_824),
    "small/split/val_split.npy": ("53bf2466b50b9745125924bc71dbabb8bfe9933e", 78_968),
    "small/split/test_split.npy": ("6f297565aa404b41a547640e42ed732c021169cf", 78_984),
}


def _fair(name: str, title: str, folder: str, note: str = "") -> DataSet:
    files = tuple(
        File(path, f"{_RELIANT}/{path}", f"git:{checksum}", size)
        for path, (checksum, size) in _RELIANT_FILES.items()
        if path.startswith(f"{folder}/")
    )
    return DataSet(
        name=name,
        title=title,
        licence="the repository states none; for research",
        home="https://github.com/yushundong/RELIANT",
        papers=("reliant",),
        download="tens of MB",
        holds=tuple(file.path for file in files),
        files=files,
        note=note,
    )


_FAIR = (
    _fair("recidivism", "Recidivism (bail), 18,876 defendants", "bail"),
    _fair(
        "credit",
        "Credit defaulter, 30,000 clients, the authors' edge list",
        "credit",
        note="unzip credit/credit_edges.txt.zip where it lies",
    ),
    _fair("dblp", "DBLP co-authors, the smaller of two", "small"),
)

_ACCOUNTS = (
    DataSet(
        name="mgtab",
        title="MGTAB, 10,199 labelled accounts and seven relations",
        licence="CC BY-NC-ND 4.0",
        home="https://github.com/GraphDetec/MGTAB",
        papers=("mgtab",),
        download="about 100 MB",
        holds=("mgtab/features.pt", "mgtab/edge_index.pt", "mgtab/edge_type.pt", "mgtab/labels_bot.pt"),
        folder="mgtab",
        by_hand=(
            "follow the link to the archive in the README of https://github.com/GraphDetec/MGTAB (a browser is needed)",
            "unpack it, so that {dest}/mgtab/features.pt is there",
        ),
    ),
)

_DIGITS = "https://ossci-datasets.s3.amazonaws.com/mnist"
_TEXTS_AND_IMAGES = (
    DataSet(
        name="mnist",
        title="MNIST, 70,000 digits in idx files",
        licence="CC BY-SA 3.0",
        home="https://yann.lecun.com/exdb/mnist",
        papers=("graphcl_augmentations",),
        download="about 11 MB",
        holds=tuple(f"MNIST/raw/{part}-ubyte.gz" for part in ("train-images-idx3", "t10k-labels-idx1")),
        files=tuple(
            File(f"MNIST/raw/{part}-ubyte.gz", f"{_DIGITS}/{part}-ubyte.gz")
            for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        ),
    ),
    DataSet(
        name="subjectivity",
        title="Subjectivity, 10,000 sentences, and word2vec's vectors",
        licence="research use (Pang and Lee 2004)",
        home="https://github.com/giannisnik/mpad",
        papers=("graphcl_augmentations",),
        download="about 1.3 MB of sentences, 1.6 GB of vectors",
        holds=("subjectivity/subjectivity.txt",),
        folder="subjectivity",
        by_hand=(
            "save datasets/subjectivity.txt of https://github.com/giannisnik/mpad in {dest}/subjectivity",
            "for the preset subjectivity put GoogleNews-vectors-negative300.bin beside it, unpacked, from "
            "https://code.google.com/archive/p/word2vec",
            "put a table of synonyms beside it: wordnet_synonyms.tsv, lines of word, tab, synonyms joined by |",
        ),
    ),
)

_ALL = (
    *_GRAPHS,
    *_GRAPH_SETS,
    *_FAIR,
    *_ACCOUNTS,
    *_TEXTS_AND_IMAGES,
    *_SHAPES,
    *_CLICKS,
    *_DRIVING,
)
CATALOGUE: dict[str, DataSet] = {entry.name: entry for entry in _ALL}
"""All entries by name."""
