// Runs functions of the C sources for tests on a machine that is emulated: requests on stdin, results on stdout.
//
// request   i64 number of the function, i64 number of arguments, then each: i64 size and so many bytes of an array,
//           or i64 -1 and an i64
// result    i64, then the bytes of every array, as the function left them

#include <stdio.h>
#include <stdlib.h>

#include "segments.c"

enum { MOST_ARGUMENTS = 11 };

typedef i64 function(i64, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64);

#define FUNCTION(name) (function *)(void *)name
static function *const functions[] = {FUNCTIONS};

static void get(void *data, size_t size) {
    if (size && fread(data, size, 1, stdin) != 1)
        exit(0);
}

int main(void) {
    for (;;) {
        i64 number, count, a[MOST_ARGUMENTS] = {0}, sizes[MOST_ARGUMENTS];
        get(&number, sizeof number);
        get(&count, sizeof count);
        for (int k = 0; k < count; k++) {
            get(&sizes[k], sizeof sizes[k]);
            if (sizes[k] < 0) {
                get(&a[k], sizeof a[k]);
                continue;
            }
            void *array = malloc((size_t)sizes[k] + 1);
            get(array, (size_t)sizes[k]);
            a[k] = (i64)array;
        }
        i64 result = functions[number](a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]);
        fwrite(&result, sizeof result, 1, stdout);
        for (int k = 0; k < count; k++) {
            if (sizes[k] < 0)
                continue;
            fwrite((void *)a[k], 1, (size_t)sizes[k], stdout);
            free((void *)a[k]);
        }
        fflush(stdout);
    }
}
