/* SPDX-License-Identifier: MIT
 * Takes the noise off a picture and keeps its edges, with one call: every pixel becomes the mean of
 * the 11 x 11 pixels around it, weighted by how much they are like it. That is neighborhood
 * attention: softmax(query . key) = exp(-(p - p')^2 / h^2), up to what the softmax divides away, if
 * query = (p, 1) and key = (2 p, -p^2) / h^2.
 *
 *     cc smooth.c $(pkg-config --cflags --libs natten) -o smooth
 *     LD_LIBRARY_PATH=$(pkg-config --variable=libdir natten) ./smooth
 */
#include <natten.h>
#include <stdio.h>

enum { SIZE = 96, PIXELS = SIZE * SIZE };

static float clean[PIXELS], noisy[PIXELS], smooth[PIXELS], query[PIXELS][2], key[PIXELS][2];

/* Between -1 and 1; twelve of them are nearly normal. */
static float random_number(void)
{
    static unsigned state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 8388608.0f - 1.0f;
}

/* A bright disc on dark ground, and noise. */
static void draw(void)
{
    for (int i = 0; i < PIXELS; i++) {
        int y = i / SIZE - SIZE / 2, x = i % SIZE - SIZE / 2;
        float noise = 0;
        for (int n = 0; n < 12; n++)
            noise += random_number();
        clean[i] = x * x + y * y < 30 * 30 ? 0.8f : 0.2f;
        noisy[i] = clean[i] + 0.05f * noise;
    }
}

static double mean_square_error(const float *picture)
{
    double sum = 0;
    for (int i = 0; i < PIXELS; i++)
        sum += (picture[i] - clean[i]) * (picture[i] - clean[i]);
    return sum / PIXELS;
}

int main(void)
{
    const float h = 0.3f; /* pixels that differ by less are alike */
    draw();
    for (int i = 0; i < PIXELS; i++) {
        query[i][0] = noisy[i];
        query[i][1] = 1;
        key[i][0] = 2 * noisy[i] / (h * h);
        key[i][1] = -noisy[i] * noisy[i] / (h * h);
    }
    natten_problem problem;
    natten_problem_init(&problem, NATTEN_FORWARD, NATTEN_F32, 2);
    for (int a = 0; a < 2; a++) {
        problem.axis[a].query_extent = SIZE;
        problem.axis[a].window = 11;
    }
    problem.head_dim = 2;
    problem.value_dim = 1;
    natten_problem_pack(&problem, NATTEN_HEADS_LAST);
    natten_run run = {.data = {[NATTEN_QUERY] = query,
                               [NATTEN_KEY] = key,
                               [NATTEN_VALUE] = noisy,
                               [NATTEN_OUT] = smooth}};
    if (natten_compute(&problem, &run) != NATTEN_OK) {
        fprintf(stderr, "%s\n", natten_last_error());
        return 1;
    }
    double before = mean_square_error(noisy), after = mean_square_error(smooth);
    printf("natten %s: mean square error %.5f before, %.5f after\n", natten_version(), before,
           after);
    return after * 8 > before; /* the picture must have become much cleaner */
}
