// Few rows, for which one block each would leave most of the GPU idle: each is cut into pieces. Three launches, of which
// the second finds the row in L2 and the third is tiny. Not for the spread row, whose sums depend on who adds up what.

// What is known of a piece, and of the whole row by merging.
template <typename logit_t, int how> struct PieceSums {
    using real = real_of<logit_t, how>;
    TopTwo<real> top;
    unsigned long long sum, moment;
    int argmax, before;
};

// 1. The largest two logits of each piece. grid (rows * slices), block 256.
template <typename logit_t, int how> __global__ __launch_bounds__(256, 4) void piece_tops(const Task task) {
    const Piece piece(task, blockIdx.x);
    const Slice<logit_t> slice = piece.logits<logit_t>(task);
    BlockGroup<1> group;
    InMemory<logit_t, how, false> held{task, slice, group.thread(), (int)blockDim.x, nullptr};
    VectorTops<logit_t, how> tops;
    held.load([&](uint4 raw, int column) { tops.add(task, raw, column, piece.count); });
    const auto top = group.reduce(tops.found(), MergeTopTwo());
    if (group.leads()) static_cast<PieceSums<logit_t, how>*>(task.pieces)[blockIdx.x].top = top;
}

// The largest two of the row, for all threads of the block.
template <typename logit_t, int how, class Group>
__device__ __forceinline__ TopTwo<real_of<logit_t, how>> top_of_row(const Task& task, Group& group, long long row) {
    const auto* pieces = static_cast<const PieceSums<logit_t, how>*>(task.pieces) + row * task.slices;
    TopTwo<real_of<logit_t, how>> top;
    for (int i = group.thread(); i < task.slices; i += blockDim.x) top = MergeTopTwo()(top, pieces[i].top);
    return group.reduce(top, MergeTopTwo());
}

// 2. The sums of each piece. grid (rows * slices), block 256.
template <typename logit_t, int how> __global__ __launch_bounds__(256, 3) void piece_sums(const Task task) {
    using real = real_of<logit_t, how>;
    using Row = RowSums<logit_t, float, how>;
    const Piece piece(task, blockIdx.x);
    const Slice<logit_t> slice = piece.logits<logit_t>(task);
    BlockGroup<1> group;
    const auto top = top_of_row<logit_t, how>(task, group, piece.row);
    const Exponential<logit_t, how> e(task.inverse_temperature);
    const SpreadRow<logit_t, float, how> no_spread(task, piece.row, piece.begin);

    const long long first_class = task.vocab_start + piece.begin, label = (how & with_rank) ? task.labels[piece.row] : 0;
    double ranked = 0.0;
    if (how & with_rank) ranked = task.ranked_logit[piece.row];
    InMemory<logit_t, how, false> held{task, slice, group.thread(), (int)blockDim.x, nullptr};
    Row row;
    held.load([&](uint4 raw, int column) {
        real x[Format<logit_t>::per_vector];
        unpack<logit_t, how>(task, raw, x, column, piece.count);
        row.add(task, x, column, piece.count, top, e, no_spread, first_class, ranked, label);
    });
    auto& mine = static_cast<PieceSums<logit_t, how>*>(task.pieces)[blockIdx.x];
    const auto sum = group.reduce(row.sum.packed(), typename Row::Sums::Plus());
    const auto moment = (how & with_moment) ? group.reduce(row.moment.packed(), typename Row::Sums::Plus()) : 0;
    const int argmax = (how & with_argmax) ? group.reduce(row.argmax, Smaller()) : 0;
    const int before = (how & with_rank) ? group.reduce(row.before, Sum()) : 0;
    if (group.leads()) {
        mine.sum = sum;
        mine.moment = moment;
        mine.argmax = argmax == Smaller::nothing<int>() ? argmax : argmax + piece.begin;
        mine.before = before;
    }
}

// 3. The record of each row. grid (rows), block 32.
template <typename logit_t, int how> __global__ __launch_bounds__(32) void merge_pieces(const Task task) {
    using Plus = FixedSum::Plus;
    const long long row = blockIdx.x;
    LaneGroup<32> group;
    const auto top = top_of_row<logit_t, how>(task, group, row);
    const auto* pieces = static_cast<const PieceSums<logit_t, how>*>(task.pieces) + row * task.slices;
    unsigned long long sum = 0, moment = 0;
    int argmax = Smaller::nothing<int>(), before = 0;
    for (int i = group.thread(); i < task.slices; i += 32) {
        sum = Plus()(sum, pieces[i].sum);
        moment = Plus()(moment, pieces[i].moment);
        argmax = Smaller()(argmax, pieces[i].argmax);
        before += pieces[i].before;
    }
    sum = group.reduce(sum, Plus());
    moment = group.reduce(moment, Plus());
    Stats stats = finished<how>(task, top, FixedSum::value(sum), FixedSum::value(moment));
    argmax = group.reduce(argmax, Smaller());
    stats.argmax = argmax == Smaller::nothing<int>() ? no_class : task.vocab_start + argmax;
    stats.rank = group.reduce(before, Sum());
    if (group.leads()) write<how>(task, row, stats);
}
