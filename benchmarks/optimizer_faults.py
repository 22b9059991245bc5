"""Faults of the optimizers, for `mutations.py`: name, file, old, new, tests."""

OPTIMIZER_FAULTS = (
    (
        "a second moment is rounded to the nearest",
        "optim/bfloat16.py",
        "    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))",
        "    return x.astype(jnp.bfloat16)",
        "test_optim.py -k second_moment",
    ),
    (
        "every update rounds by the same bits",
        "optim/bfloat16.py",
        '"threefry2x32"), new.count)',
        '"threefry2x32"), 0)',
        "test_optim.py -k second_moment",
    ),
    (
        "all parameters round by the same bits",
        "optim/bfloat16.py",
        "_round_both(jax.random.fold_in(key, i), m, v)",
        "_round_both(key, m, v)",
        "test_optim.py -k random_bits",
    ),
    (
        "Adafactor clips all layers together",
        "optim/adafactor.py",
        "            scaled, *new = over(layout.fold(grad), row, column, full)\n",
        "            scaled, *new = over(layout.fold(grad), row, column, full)\n"
        "            scaled = clip.update(scaled / 0.7, optax.EmptyState())[0]\n",
        "test_optim.py -k 'papers or alone'",
    ),
    (
        "heads are a matrix of their own",
        "optim/layouts.py",
        "groups[-1] = (*groups[-1], i)",
        "groups[-1] = (i,)",
        "test_optim.py -k 'letters or papers'",
    ),
    (
        "Muon takes all layers for one matrix",
        "optim/muon.py",
        "    made = jax.lax.map(one_each, each).swapaxes(0, 1).reshape(padded.shape)",
        "    made = one_each(padded.reshape(1, -1, sizes[1])).reshape(padded.shape)",
        "test_optim.py -k 'alone or posts'",
    ),
    (
        "Muon takes embedding and head too",
        "optim/muon.py",
        '"muon" if x.stacked and x.is_matrix else "adam"',
        '"muon" if x.stacked else "adam"',
        "test_optim.py -k rest_to_adam",
    ),
    (
        "Muon's layers are not dealt out",
        "optim/muon.py",
        "    for rules in places:\n        padded = constrain(padded, dims, rules)\n",
        "",
        "test_optim.py -k dealt_out",
    ),
    (
        "factored statistics are on every device",
        "optim/places.py",
        "return _folded(x.shape, param, layout, path[:start]) or other",
        "return other",
        "test_optim_state.py -k 'lie_with or lie_as'",
    ),
    (
        "moments are on every device",
        "optim/places.py",
        "            return param.sharding\n",
        "            return other\n",
        "test_optim_state.py -k lie_with",
    ),
    (
        "the optimizer's state stays on the devices after updates",
        "train.py",
        "        self.state = self.setup.park(self.state)\n        if logged",
        "        if logged",
        "test_optim_state.py -m slow -k 'interrupted and bf16'",
    ),
    (
        "Adafactor takes settings that it does not read",
        "config/checks.py",
        'if o.kind == "adafactor":',
        'if o.kind == "adafacto":',
        "test_optim.py -k refuses",
    ),
)
