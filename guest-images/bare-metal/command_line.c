/* The command line: words parted by spaces, the ones of interest of the form key=value. */

#include "machine.h"

static const char *command_line = "";

void command_line_set(const char *text)
{
    if (text != 0)
        command_line = text;
}

/* What follows `key=`, or null. */
static const char *value_of(const char *key)
{
    for (const char *word = command_line; *word != 0;) {
        size_t at = 0;
        while (key[at] != 0 && word[at] == key[at])
            at++;
        if (key[at] == 0 && word[at] == '=')
            return word + at + 1;
        while (*word != 0 && *word != ' ')
            word++;
        while (*word == ' ')
            word++;
    }
    return 0;
}

uint32_t command_line_number(const char *key, uint32_t otherwise)
{
    const char *digit = value_of(key);
    if (digit == 0 || *digit < '0' || *digit > '9')
        return otherwise;
    uint32_t number = 0;
    for (; *digit >= '0' && *digit <= '9'; digit++) {
        uint32_t last = (uint32_t)(*digit - '0');
        if (number > (UINT32_MAX - last) / 10)
            return UINT32_MAX;
        number = number * 10 + last;
    }
    return number;
}

bool command_line_is(const char *key, const char *word)
{
    const char *value = value_of(key);
    if (value == 0)
        return false;
    size_t at = 0;
    while (word[at] != 0 && value[at] == word[at])
        at++;
    return word[at] == 0 && (value[at] == 0 || value[at] == ' ');
}
