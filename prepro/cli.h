/* cli.h - the command line of all programs here: one clear line when something is wrong, and options from a table.
   Header only. A program says its name first:   #define VIVIM_PROGRAM "affine"  */
#ifndef VIVIM_CLI_H
#define VIVIM_CLI_H

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#ifndef VIVIM_PROGRAM
#define VIVIM_PROGRAM "train_vivim"
#endif

// One line on stderr - what, where, what to do - and exit status 1
__attribute__((format(printf, 1, 2))) static void fail(const char *format, ...) {
    va_list args; va_start(args, format);
    fflush(stdout); fprintf(stderr, VIVIM_PROGRAM ": ");
    vfprintf(stderr, format, args); fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

// Whether what is written to `out` would take the place of `path`; "" is no file
static inline int same_file(const char *out, const char *path) {
    struct stat a, b;
    return stat(out, &a) == 0 && stat(path, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

// One table gives parsing, defaults, limits, --help and the head of a log. The last row has the name NULL.
typedef struct {
    const char *name, *fallback, *help;
    char kind;  // 's' text, 'i' whole number, 'd' number, 'f' flag without a value
    double low, high;
    size_t field;  // offset in the program's struct of options: const char *, int, double, int
} Option;

static inline void option_set(void *options, const Option *option, const char *value) {
    void *field = (char *)options + option->field;
    if (option->kind == 'f') {
        *(int *)field = value[0] != '\0';
    } else if (option->kind == 'i' && value == option->fallback && value[0] == '\0') {
        *(int *)field = 0;  // no fallback: the program sees that nothing was said
    } else if (option->kind == 's') {
        if (value[0] == '\0' && option->fallback[0])
            fail("--%s '': is empty; leave it out for %s", option->name, option->fallback);
        *(const char **)field = value;
    } else {
        char *end; errno = 0;
        double number = strtod(value, &end);
        if (end == value || *end != '\0' || errno || !(number >= option->low && number <= option->high) ||
            (option->kind == 'i' && number != floor(number)))
            fail("--%s %s: wants a %s from %g to %g", option->name, value, option->kind == 'i' ? "whole number" : "number",
                 option->low, option->high);
        if (option->kind == 'i') *(int *)field = (int)number;
        else *(double *)field = number;
    }
}

// Fills the struct: every option's fallback, then what the command line says
static inline void options_parse(void *options, const Option *table, int argc, char **argv) {
    for (const Option *t = table; t->name; t++) option_set(options, t, t->fallback);
    for (int a = 1; a < argc; a++) {
        const Option *t = table;
        while (t->name && (strncmp(argv[a], "--", 2) != 0 || strcmp(argv[a] + 2, t->name) != 0)) t++;
        if (t->name == NULL) fail("%s: no such option; --help lists them", argv[a]);
        if (t->kind != 'f' && a + 1 == argc) fail("%s: a value must follow; --help says which", argv[a]);
        option_set(options, t, t->kind == 'f' ? "1" : argv[++a]);
    }
}

static inline void options_help(const Option *table) {
    for (const Option *t = table; t->name; t++)
        printf(t->fallback[0] ? "  --%-15s %s [%s]\n" : "  --%-15s %s\n", t->name, t->help, t->fallback);
}

enum { OPTION_TEXT = 4096 };  // room for a value as text

static inline void option_text(char text[OPTION_TEXT], const void *options, const Option *option) {
    const void *field = (const char *)options + option->field;
    if (option->kind == 's') snprintf(text, OPTION_TEXT, "%s", *(const char *const *)field);
    else if (option->kind == 'd') snprintf(text, OPTION_TEXT, "%.15g", *(const double *)field);
    else snprintf(text, OPTION_TEXT, "%d", *(const int *)field);
}

// A comment line for each option with a value, as the head of a log
static inline void options_print(FILE *f, const void *options, const Option *table) {
    char text[OPTION_TEXT];
    for (const Option *t = table; t->name; t++) {
        option_text(text, options, t);
        if (t->kind != 'f') fprintf(f, "# --%s %s\n", t->name, text);
    }
}

#endif
