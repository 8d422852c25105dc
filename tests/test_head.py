"The heads: first weights, gradients, precision, odd sizes, nothing to learn from."
import pytest
import torch

from spectralmoe.benchmarks import IGNORE
from spectralmoe.head import (
    Mask2FormerHead, PixelShuffleHead, RawConvHead, class_masks, feature_pyramid, pixel_cross_entropy,
    pyramid_blocks, query_scores)

SMALL = dict(n_queries=6, hidden=32, encoder_layers=1, decoder_layers=2, n_heads=4, encoder_width=32,
             decoder_width=32, n_points=64)


def mask2former(linked=True, seed=0):
    torch.manual_seed(seed)
    return Mask2FormerHead(12, 3, linked=linked, **SMALL)


def maps(rows=5, columns=7, n=2):
    g = torch.Generator().manual_seed(1)
    return feature_pyramid([torch.randn(n, rows * columns, 12, generator=g)] * 4, (rows, columns))


def labels(height=41, width=53, n=2):
    return torch.randint(0, 3, (n, height, width), generator=torch.Generator().manual_seed(2))


def queries(requires_grad=False):
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(3)).requires_grad_(requires_grad)


def test_blocks_and_pyramid():
    assert pyramid_blocks(24) == (7, 11, 15, 23)
    assert all(0 <= b < n for n in range(1, 41) for b in pyramid_blocks(n))
    assert [m.shape[-2:] for m in maps(5, 7)] == [(20, 28), (10, 14), (5, 7), (2, 3)]
    with pytest.raises(ValueError, match="36 tokens do not fill a 5 x 7 grid"):
        feature_pyramid([torch.zeros(1, 36, 2)] * 4, (5, 7))


@pytest.mark.parametrize("n", [1, 2])
def test_a_map_of_one_cell_is_refused_where_group_norm_would_erase_it(n):
    "In batches of one and of more: without the refusal only a batch of one fails."
    with pytest.raises(ValueError, match="maps are 8 x 8, 4 x 4, 2 x 2, 1 x 1 cells: with hidden = 32"):
        mask2former()(maps(2, 2, n), queries())


@pytest.mark.parametrize("grid", [(5, 7), (7, 7), (9, 4), (6, 8), (1, 3)])
def test_the_released_pyramid_scales_by_a_factor(grid):
    "The released code calls interpolate with scale_factor 4, 2 and 0.5; where half a side is less than a cell it cannot."
    tokens = [torch.randn(2, grid[0] * grid[1], 12) for _ in range(4)]
    ours = feature_pyramid(tokens, grid, by_factor=True)
    for t, m, s in zip(tokens, ours, (4, 2, 1, 0.5)):
        if min(grid) * s < 1: continue
        theirs = torch.nn.functional.interpolate(t.transpose(1, 2).unflatten(2, grid), scale_factor=s, mode="bilinear", align_corners=False)
        torch.testing.assert_close(m, theirs)
    same = [torch.allclose(a, b) for a, b in zip(ours, feature_pyramid(tokens, grid))]
    assert same == [True, True, True, all(side % 2 == 0 for side in grid) or min(grid) == 1], "only the half of an odd grid differs"


def test_sizes_are_refused_by_name():
    for sizes, words in ((dict(n_points=0), "n_points = 0; expected a whole number of at least 1"), (dict(hidden=64.0), "hidden = 64.0"),
                         (dict(decoder_layers=-1), "decoder_layers = -1"), (dict(importance=1.5), "importance = 1.5")):
        with pytest.raises(ValueError, match=words): Mask2FormerHead(12, 3, **{**SMALL, **sizes})


def test_a_head_can_be_pickled_and_forgets_the_class_weights_of_older_states():
    import pickle
    head = pickle.loads(pickle.dumps(mask2former()))
    assert "criterion.empty_weight" not in head.state_dict()
    outer = torch.nn.ModuleDict({"head": head})
    outer.load_state_dict({**outer.state_dict(), "head.criterion.empty_weight": torch.zeros(4)}, strict=True)
    assert head.criterion.empty_weight.tolist() == pytest.approx([1, 1, 1, 0.1])
    with pytest.raises(RuntimeError, match="criterion.other"): outer.load_state_dict({**outer.state_dict(), "head.criterion.other": torch.zeros(4)})


def test_first_weights_are_not_the_librarys_trap():
    head = mask2former()
    for layer in head.pixel_decoder.encoder.layers:
        bias = layer.self_attn.sampling_offsets.bias.view(4, 3, 4, 2)
        assert bias.norm(dim=-1).min() >= 1
        assert len(bias[:, 0].flatten(0, 1).unique(dim=0)) == 16
        assert layer.self_attn.value_proj.weight.std() > 0.1
    assert 0.7 < head.pixel_decoder.level_embed.std() < 1.3
    assert all(p.isfinite().all() for p in head.parameters())


def test_first_weights_depend_on_the_seed_alone():
    one, two = mask2former(seed=4).state_dict(), mask2former(seed=4).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("linked", [True, False])
def test_every_parameter_and_the_queries_get_a_gradient(linked):
    head, given = mask2former(linked), queries(requires_grad=True) if linked else None
    head.loss(head(maps(), given), labels())["loss"].backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []
    if linked:
        assert (given.grad.abs().amax(1) > 0).all()


def test_queries_are_asked_for_and_refused():
    with pytest.raises(ValueError, match="queries are None"):
        mask2former()(maps())
    with pytest.raises(ValueError, match=r"queries are \(5, 32\), this head takes \(6, 32\)"):
        mask2former()(maps(), queries()[:5])
    with pytest.raises(ValueError, match="this head takes None"):
        mask2former(linked=False)(maps(), queries())


def test_loss_is_fixed_by_the_seed():
    head = mask2former()
    output = head(maps(), queries())
    def loss(seed):
        torch.manual_seed(seed)
        return head.loss(output, labels())
    assert loss(0)["loss"] == loss(0)["loss"] != loss(1)["loss"]
    terms = loss(0)
    assert all(name.startswith("loss") for name in terms)
    torch.testing.assert_close(terms.pop("loss"), sum(terms.values()))


def test_bf16_autocast():
    head, given = mask2former(), queries(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = head(maps(), given)
        loss = head.loss(output, labels())["loss"]
    assert output.classes[-1].dtype == torch.bfloat16
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert given.grad.isfinite().all()
    assert head.logits(output, (41, 53)).dtype == torch.float32


@pytest.mark.parametrize("empty", [slice(0, 1), slice(0, 2)])
def test_images_without_labels(empty):
    head, target = mask2former(), labels()
    target[empty] = IGNORE
    head.loss(head(maps(), queries()), target)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


@pytest.mark.parametrize("grid, hidden", [((1, 1), 64), ((2, 2), 64), ((3, 8), 64), ((7, 5), 32)])
def test_odd_grids_and_image_sizes(grid, hidden):
    torch.manual_seed(0)
    head = Mask2FormerHead(12, 3, **{**SMALL, "hidden": hidden})
    output = head(maps(*grid), torch.randn(6, hidden))
    assert head.logits(output, (37, 91)).shape == (2, 3, 37, 91)
    assert head.loss(output, labels(37, 91))["loss"].isfinite()


@pytest.mark.parametrize("make", [mask2former, lambda: RawConvHead(3, 3)])
def test_unknown_labels_are_refused(make):
    head = make()
    output = head(maps() if head.scales else torch.randn(2, 3, 41, 53), queries() if head.scales else None)
    with pytest.raises(ValueError, match=r"labels hold \[3, 9\], but the head knows classes 0..2"):
        head.loss(output, labels().masked_fill(labels() == 1, 9).masked_fill(labels() == 2, 3))


def test_training_step_moves_the_answer_to_the_target():
    head, target = mask2former(), labels().fill_(1)
    optimiser = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for _ in range(25):
        optimiser.zero_grad()
        head.loss(head(maps(), queries()), target)["loss"].backward()
        optimiser.step()
    assert (head.logits(head(maps(), queries()), (41, 53)).argmax(1) == 1).float().mean() > 0.99


@pytest.mark.parametrize("patch, block", [(4, 2), (8, 4), (14, 4), (16, 4), (32, 8)])
def test_a_token_lands_in_its_own_block(patch, block):
    head = PixelShuffleHead(12, 3, patch)
    assert head.block == block and 2 <= patch / block <= 4
    dark = torch.randn(1, 12, 3, 5)
    lit = dark.clone()
    lit[..., 1, 4] += torch.randn(12)
    changed = (head([lit] * 4) != head([dark] * 4)).any(1)[0]
    expected = torch.zeros(3 * block, 5 * block, dtype=torch.bool)
    expected[block:2 * block, 4 * block:] = True
    assert torch.equal(changed, expected)


def test_pixel_shuffle_keeps_rows_and_columns_inside_the_block():
    head = PixelShuffleHead(12, 3, 8)
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.copy_(torch.arange(3 * 16))
    token = head([torch.randn(1, 12, 1, 1)] * 4)[0]
    assert torch.equal(token, torch.arange(48.0).view(3, 4, 4))


@pytest.mark.parametrize("head, features", [
    (PixelShuffleHead(12, 3, 8), feature_pyramid([torch.randn(2, 35, 12)] * 4, (5, 7), scales=(1, 1, 1, 1))),
    (RawConvHead(4, 3), torch.randn(2, 4, 41, 53))])
def test_heads_without_queries(head, features):
    assert not head.wants_queries
    output = head(features, None)
    assert head.logits(output, (41, 53)).shape == (2, 3, 41, 53)
    assert head.loss(output, torch.full((2, 41, 53), IGNORE))["loss"] == 0
    head.loss(output, labels())["loss"].backward()
    assert all(p.grad is not None for p in head.parameters())


