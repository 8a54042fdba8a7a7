/* jpeg.h - what libjpeg does when a file is damaged: it says why and jumps back. Header only; the program defines before

       int failed(char *message, const char *format, ...)      writes the message, returns -1

   and sets  jpeg.err = jpeg_std_error(&errors.manager), errors.manager.error_exit = jpeg_stop,
   errors.manager.emit_message = jpeg_warning, errors.message, and setjmp(errors.jump). */
#ifndef VIVIM_JPEG_H
#define VIVIM_JPEG_H

#include <setjmp.h>
#include <stdio.h>
#include <jpeglib.h>
#include <jerror.h>

typedef struct { struct jpeg_error_mgr manager; jmp_buf jump; char *message; } JpegErrors;

static void jpeg_stop(j_common_ptr jpeg) {
    JpegErrors *errors = (JpegErrors *)jpeg->err;
    char reason[JMSG_LENGTH_MAX];
    (*jpeg->err->format_message)(jpeg, reason);
    failed(errors->message, "damaged or unusual JPEG (%s)", reason);
    longjmp(errors->jump, 1);
}

// libjpeg fills the missing part of a truncated file with grey and calls that a warning (level -1). Here it is an error;
// only remarks about headers and about bytes between two segments, which cost no pixel, are let through.
static void jpeg_warning(j_common_ptr jpeg, int level) {
    int code = jpeg->err->msg_code;
    if (level < 0 && code != JWRN_EXTRANEOUS_DATA && code != JWRN_JFIF_MAJOR && code != JWRN_ADOBE_XFORM) jpeg_stop(jpeg);
}

#endif
