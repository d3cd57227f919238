import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.ops.rope_cases import poisoned_cache

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
# num_layers, num_pages, num_pairs, the shape of a page
SHAPES = [
    (1, 2, 1, (1,)),
    (3, 7, 3, (2, 2, 4, 5)),
    (2, 40, 20, (2, 8, 16, 128)),
    (5, 9, 4, (2, 3, 16, 80)),
    (128, 3, 1, (2, 1, 16, 64)),
    (2, 4, 0, (2, 1, 16, 64)),
]


def random_caches(num_layers, num_pages, page, dtype, device):
    caches = [torch.randn(num_pages, *page) for _ in range(num_layers)]
    if dtype == torch.int8:
        caches = [x * 50 for x in caches]
    return [x.to(dtype).to(device) for x in caches]


def random_pairs(num_pairs, num_pages, device):
    pages = torch.randperm(num_pages, dtype=torch.int32)[: 2 * num_pairs].to(device)
    return pages[:num_pairs], pages[num_pairs:]


def assert_same_bytes(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert torch.equal(x.cpu().view(torch.uint8), y.cpu().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_layers, num_pages, num_pairs, page", SHAPES)
def test_within_the_caches(num_layers, num_pages, num_pairs, page, dtype, device):
    caches = random_caches(num_layers, num_pages, page, dtype, device)
    from_pages, to_pages = random_pairs(num_pairs, num_pages, device)
    expected = reference.copy_pages(caches, from_pages, to_pages)
    assert ops.copy_pages(caches, from_pages, to_pages) is None
    assert_same_bytes(caches, expected)


@pytest.mark.parametrize("num_layers, num_pages, num_pairs, page", SHAPES)
def test_from_other_caches(num_layers, num_pages, num_pairs, page, device):
    sources = random_caches(num_layers, num_pages, page, torch.bfloat16, device)
    caches = [
        poisoned_cache(num_pages + 2, 1, 1, 1, torch.bfloat16, device).flatten()[: num_pages + 2]
        for _ in range(num_layers)
    ]
    caches = [x.view(-1, *[1] * len(page)).expand(-1, *page).contiguous() for x in caches]
    from_pages = torch.randint(num_pages, (num_pairs,), dtype=torch.int32, device=device)
    to_pages = torch.randperm(num_pages + 2, dtype=torch.int32)[:num_pairs].to(device)
    expected = reference.copy_pages(caches, from_pages, to_pages, from_caches=sources)
    before = [x.clone() for x in sources]
    ops.copy_pages(caches, from_pages, to_pages, from_caches=sources)
    assert_same_bytes(caches, expected)
    assert_same_bytes(sources, before)


def test_pages_that_do_not_exist(device):
    caches = random_caches(2, 4, (2, 1, 4, 8), torch.float32, device)
    from_pages = torch.tensor([-1, 0, 4, 1, 2], dtype=torch.int32, device=device)
    to_pages = torch.tensor([3, -1, 3, 2**31 - 1, 0], dtype=torch.int32, device=device)
    expected = [torch.cat([x[2:3], x[1:]]) for x in caches]
    ops.copy_pages(caches, from_pages, to_pages)
    assert_same_bytes(caches, expected)


def test_odd_addresses(device):
    caches = [torch.randn(6 * 64 + 1, device=device).half()[1:].view(6, 64) for _ in range(2)]
    from_pages, to_pages = random_pairs(3, 6, device)
    expected = reference.copy_pages(caches, from_pages, to_pages)
    ops.copy_pages(caches, from_pages, to_pages)
    assert_same_bytes(caches, expected)


@pytest.mark.parametrize("page", [(2, 8, 16, 128), (2, 1, 3, 5)], ids=str)
def test_swap_to_the_host_and_back(page):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    num_layers, num_pages, num_pairs = 4, 30, 11
    caches = random_caches(num_layers, num_pages, page, torch.bfloat16, "cuda")
    host = [torch.full((num_pairs, *page), torch.nan, dtype=torch.bfloat16).pin_memory() for _ in caches]
    pages = torch.randperm(num_pages, dtype=torch.int32)[:num_pairs].cuda()
    there = torch.randperm(num_pairs, dtype=torch.int32).cuda()
    expected = reference.copy_pages(host, pages, there, from_caches=[x.cpu() for x in caches])
    ops.copy_pages(host, pages, there, from_caches=caches)
    torch.cuda.synchronize()
    assert_same_bytes(host, expected)
    whole = [x.clone() for x in caches]
    for cache in caches:
        cache[pages.long()] = torch.nan
    ops.copy_pages(caches, there, pages, from_caches=host)
    assert_same_bytes(caches, whole)


def test_in_a_cuda_graph():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    caches = random_caches(3, 8, (2, 2, 16, 64), torch.float16, "cuda")
    from_pages, to_pages = random_pairs(4, 8, "cuda")
    ops.copy_pages(caches, from_pages[:0], to_pages[:0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.copy_pages(caches, from_pages, to_pages)
    from_pages.copy_(from_pages.roll(1))
    expected = reference.copy_pages(caches, from_pages, to_pages)
    graph.replay()
    assert_same_bytes(caches, expected)


def test_opcheck_and_compile(device):
    caches, sources = (random_caches(2, 5, (2, 1, 4, 8), torch.float32, device) for _ in range(2))
    from_pages, to_pages = random_pairs(2, 5, device)
    torch.library.opcheck(torch.ops.fastkernels.copy_pages.default, (caches, from_pages, to_pages, sources))

    def step(a, b, x):
        ops.copy_pages([a, b], from_pages, to_pages)
        return a.sum() + b.sum() + x

    eager, traced = [x.clone() for x in caches], [x.clone() for x in caches]
    x = torch.randn(3, device=device)
    expected = step(*eager, x)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*traced, x), expected)
    assert_same_bytes(traced, eager)


def test_refuses_what_it_does_not_take():
    caches = [torch.randn(4, 2, 1, 4, 8) for _ in range(2)]
    pages = torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="0 caches are given, but the op takes 1 to 128"):
        ops.copy_pages([], pages, pages)
    with pytest.raises(ValueError, match="129 caches are given, but the op takes 1 to 128"):
        ops.copy_pages(caches[:1] * 129, pages, pages)
    with pytest.raises(ValueError, match="1 from_caches are given for 2 caches"):
        ops.copy_pages(caches, pages, pages, from_caches=caches[:1])
    with pytest.raises(ValueError, match="from_pages is int64, but the op takes int32"):
        ops.copy_pages(caches, pages.long(), pages)
    with pytest.raises(ValueError, match=r"to_pages has shape \[1\], but the op takes \[num_pairs\]"):
        ops.copy_pages(caches, pages, pages[:1])
    with pytest.raises(ValueError, match=r"from_pages has shape \[2, 1\], but the op takes \[num_pairs\]"):
        ops.copy_pages(caches, pages[:, None], pages)
    with pytest.raises(ValueError, match=r"caches\[0\] is float64, but the op takes"):
        ops.copy_pages([x.double() for x in caches], pages, pages)
    with pytest.raises(ValueError, match=r"from_caches\[0\] is fp16 .*takes pages alike"):
        ops.copy_pages(caches, pages, pages, from_caches=[x.half() for x in caches])
    with pytest.raises(ValueError, match=r"from_caches\[1\] is fp32 \[4, 2, 1, 4, 7\].*takes pages alike"):
        ops.copy_pages(caches, pages, pages, from_caches=[caches[0], caches[1][..., :7]])
    with pytest.raises(ValueError, match=r"caches\[1\] is \[3, .*; the layers must be alike"):
        ops.copy_pages([caches[0], caches[1][:3]], pages, pages)
    with pytest.raises(ValueError, match=r"caches\[0\] must be contiguous"):
        ops.copy_pages([torch.randn(2, 4, 8).transpose(0, 1)], pages, pages)
    with pytest.raises(ValueError, match="caches are on meta, but from_pages is on cpu"):
        ops.copy_pages([x.to("meta") for x in caches], pages, pages)
    with pytest.raises(ValueError, match="to_pages is on meta, but from_pages is on cpu"):
        ops.copy_pages(caches, pages, pages.to("meta"))
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"caches\[0\] is in host memory that is not pinned"):
            ops.copy_pages(caches, pages.cuda(), pages.cuda())
